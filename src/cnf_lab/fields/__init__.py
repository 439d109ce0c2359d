"""Vector fields and the layers they are made of."""

from cnf_lab.fields.activations import Activation as Activation
from cnf_lab.fields.activations import Elu as Elu
from cnf_lab.fields.activations import Identity as Identity
from cnf_lab.fields.activations import Relu as Relu
from cnf_lab.fields.activations import Softplus as Softplus
from cnf_lab.fields.activations import Square as Square
from cnf_lab.fields.activations import Swish as Swish
from cnf_lab.fields.activations import Tanh as Tanh
from cnf_lab.fields.base import BottleneckField as BottleneckField
from cnf_lab.fields.base import VectorField as VectorField
from cnf_lab.fields.layers import Blend as Blend
from cnf_lab.fields.layers import Concat as Concat
from cnf_lab.fields.layers import ConcatCoord as ConcatCoord
from cnf_lab.fields.layers import ConcatSquash as ConcatSquash
from cnf_lab.fields.layers import ConcatV2 as ConcatV2
from cnf_lab.fields.layers import Hyper as Hyper
from cnf_lab.fields.layers import Ignore as Ignore
from cnf_lab.fields.layers import Squash as Squash
from cnf_lab.fields.layers import TimeLinear as TimeLinear
from cnf_lab.fields.mlp import EncoderDecoder as EncoderDecoder
from cnf_lab.fields.mlp import Mlp as Mlp
from cnf_lab.fields.residual import Residual as Residual
