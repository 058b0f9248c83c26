"""How good generated images are: distances in float64, feature extractors, references, agreement and copying.

Heavy packages are imported inside the functions that need them.
"""

from edm2.metrics.agreement import label_agreement
from edm2.metrics.classifier import ClassifierFeatures, fit_classifier
from edm2.metrics.copies import CopyCheck, check_copies
from edm2.metrics.dinov2 import DinoV2Features
from edm2.metrics.extractors import CallableFeatures, FeatureExtractor, describe_extractor
from edm2.metrics.frechet import FeatureStatistics, frechet_distance
from edm2.metrics.inception import InceptionFeatures
from edm2.metrics.kernel import KernelDistance, kernel_distance, squared_mmd
from edm2.metrics.manifold import DensityCoverage, PrecisionRecall, density_coverage, precision_recall
from edm2.metrics.measure import FeatureSet, Scores, measure, score
from edm2.metrics.neighbours import Nearest, nearest_distances
from edm2.metrics.reference import Reference

__all__ = [
    "CallableFeatures",
    "ClassifierFeatures",
    "CopyCheck",
    "DensityCoverage",
    "DinoV2Features",
    "FeatureExtractor",
    "FeatureSet",
    "FeatureStatistics",
    "InceptionFeatures",
    "KernelDistance",
    "Nearest",
    "PrecisionRecall",
    "Reference",
    "Scores",
    "check_copies",
    "density_coverage",
    "describe_extractor",
    "fit_classifier",
    "frechet_distance",
    "kernel_distance",
    "label_agreement",
    "measure",
    "nearest_distances",
    "precision_recall",
    "score",
    "squared_mmd",
]
