"""Distillation: a student learns from what a teacher says, at any point of both."""

from tfcompress.distillation.attention import Attention, Relations
from tfcompress.distillation.cache import TeacherCache
from tfcompress.distillation.contrastive import Contrastive
from tfcompress.distillation.distiller import Distiller
from tfcompress.distillation.features import ActivationMaps, Features, MaskedFeatures
from tfcompress.distillation.losses import CrossEntropy, Logits, Loss, MeanSquaredError
from tfcompress.distillation.names import get
from tfcompress.distillation.relations import RKDAngle, RKDDistance, Similarity
from tfcompress.distillation.student import student

__all__ = [
    "ActivationMaps",
    "Attention",
    "Contrastive",
    "CrossEntropy",
    "Distiller",
    "Features",
    "Logits",
    "Loss",
    "MaskedFeatures",
    "MeanSquaredError",
    "RKDAngle",
    "RKDDistance",
    "Relations",
    "Similarity",
    "TeacherCache",
    "get",
    "student",
]
