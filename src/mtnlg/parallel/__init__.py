"""Layouts applied from outside: tensor, sequence, pipeline and data parallelism over a plain model."""

from mtnlg.parallel.apply import lay_out
from mtnlg.parallel.launch import launch
from mtnlg.parallel.mesh import Mesh, build_mesh, ranks_present, resolve_layout
from mtnlg.parallel.model import ParallelModel

__all__ = ["Mesh", "ParallelModel", "build_mesh", "launch", "lay_out", "ranks_present", "resolve_layout"]
