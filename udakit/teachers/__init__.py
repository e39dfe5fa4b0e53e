"""Teachers: the moving average of a student, and the fusion of several teachers."""

from udakit.teachers.copying import copy_net
from udakit.teachers.ema import EMATeacher
from udakit.teachers.fusion import fuse_teachers, teacher_agreement
from udakit.teachers.statistics import keep_statistics
from udakit.teachers.unwrap import unwrap_model

__all__ = ["EMATeacher", "copy_net", "fuse_teachers", "keep_statistics", "teacher_agreement", "unwrap_model"]
