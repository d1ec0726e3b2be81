"""Evaluate quantised models against their float model: KL, top-1 agreement, perplexity, by layer and by expert.

Example::

    from edgelm.evaluation import EvalOptions, evaluate

    report = evaluate(["bundle/", "int4-checkpoint/", "int8"], "float-checkpoint/", EvalOptions(layers=True))
    for target in report.targets:
        print(target.name, target.bits_per_weight, target.kl.mean)

A float model and checkpoints need torch (the extra `export`); the perplexity of a bundle does not.
"""

from edgelm.evaluation.result import EvaluationReport
from edgelm.evaluation.run import EvalOptions, evaluate

__all__ = ["EvalOptions", "EvaluationReport", "evaluate"]
