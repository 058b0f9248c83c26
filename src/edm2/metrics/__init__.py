"""How good generated images are: Frechet distance in float64, a feature extractor, agreement and copying.

Heavy packages are imported inside the functions that need them.
"""

from edm2.metrics.agreement import label_agreement, predict_labels
from edm2.metrics.classifier import ClassifierFeatures, fit_classifier
from edm2.metrics.frechet import FeatureStatistics, frechet_distance
from edm2.metrics.kernel import KernelDistance, kernel_distance, squared_mmd
from edm2.metrics.manifold import DensityCoverage, PrecisionRecall, density_coverage, precision_recall
from edm2.metrics.neighbours import Nearest, nearest_distances

__all__ = [
    "ClassifierFeatures",
    "DensityCoverage",
    "FeatureStatistics",
    "KernelDistance",
    "Nearest",
    "PrecisionRecall",
    "density_coverage",
    "fit_classifier",
    "frechet_distance",
    "kernel_distance",
    "label_agreement",
    "nearest_distances",
    "precision_recall",
    "predict_labels",
    "squared_mmd",
]
