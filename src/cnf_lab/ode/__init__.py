"""Solves of ordinary differential equations behind one small interface."""

from cnf_lab.ode.base import OdeSolver as OdeSolver
from cnf_lab.ode.base import SolveStats as SolveStats
from cnf_lab.ode.base import State as State
from cnf_lab.ode.runge_kutta import RungeKuttaSolver as RungeKuttaSolver
from cnf_lab.ode.torchdiffeq import ADAPTIVE as ADAPTIVE
from cnf_lab.ode.torchdiffeq import TorchdiffeqSolver as TorchdiffeqSolver
from cnf_lab.ode.torchdiffeq import backward_failures as backward_failures
