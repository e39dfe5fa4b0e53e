"""Teachers: the moving average of a student, and several teachers made one."""

from udakit.teachers.ema import EMATeacher
from udakit.teachers.fusion import fuse_teachers, teacher_agreement
from udakit.teachers.unwrap import unwrap_model

__all__ = ["EMATeacher", "fuse_teachers", "teacher_agreement", "unwrap_model"]
