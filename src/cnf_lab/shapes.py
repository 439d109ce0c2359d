"""Shape annotations of tensors, checked at run time only in the tests.

jaxtyping is a development dependency: a training machine that lacks it reads the same
annotations as plain ``Tensor``.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Float, Int
else:
    try:
        from jaxtyping import Float, Int
    except ImportError:

        class Float:
            """Stand-in: ``Float[Tensor, "batch"]`` reads as ``Tensor``."""

            def __class_getitem__(cls, item: tuple) -> type:
                return item[0]

        Int = Float

__all__ = ["Float", "Int"]
