"""`pytest --edgelm-bundle DIR`: the parity check as test items, one per check, for a device's own test run.

Without the option nothing is added and nothing is imported beyond this file. The items come after the tests that
pytest collects and carry the marker `edgelm_bundle`, so `-m edgelm_bundle` runs them alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from edgelm.bundle import ModelInfo
    from edgelm.parity.result import Check, FloatLoss, ParityReport

MARKER = "edgelm_bundle"
_LOSSES: pytest.StashKey[list[tuple[Path, FloatLoss]]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--edgelm-bundle`, `--edgelm-threads` and `--edgelm-max-kl`."""
    group = parser.getgroup("edgelm", "parity of EdgeLM bundles on this device")
    group.addoption(
        "--edgelm-bundle",
        action="append",
        default=[],
        metavar="DIR",
        help="check that this bundle computes here what its reference computed; may be repeated",
    )
    group.addoption("--edgelm-threads", type=int, default=None, metavar="N", help="threads for --edgelm-bundle")
    group.addoption(
        "--edgelm-max-kl",
        type=float,
        default=None,
        metavar="NATS",
        help="fail if the mean KL of a bundle to its float model is larger; without, the loss is only told",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker, so that --strict-markers accepts `-m edgelm_bundle`."""
    config.stash[_LOSSES] = []
    config.addinivalue_line("markers", f"{MARKER}: the parity check of a bundle given with --edgelm-bundle")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Append the items of every bundle. First of its kind, so that -k and -m apply to them too."""
    for folder in config.getoption("--edgelm-bundle"):
        items.extend(BundleCollector.from_parent(session, name=f"parity:{folder}", folder=Path(folder)).collect())


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Tell what each bundle lost against its float model, which is no test."""
    for folder, loss in config.stash[_LOSSES]:
        terminalreporter.write_line(f"{folder}: lost against the float model: {loss.text}")
        if loss.warning:
            terminalreporter.write_line(f"{folder}: warning: {loss.warning}", yellow=True)


def item_names(model: ModelInfo, max_kl: float | None) -> list[str]:
    """The items of a bundle of this model: together they stand for every check that it gets."""
    names = ["integrity", "tokenizer", "logits", "perplexity", "greedy", "embedding"]
    for layer in range(model.num_layers):
        names.append(f"layer[{layer}]")
        if model.num_experts:
            names.append(f"experts[{layer}]")
    return [*names, "head", *(() if max_kl is None else ("float_kl",))]


def stands_for(item: str, check: str) -> bool:
    """Whether an item fails with a check: "logits" with logits.kl_mean, logits.top1 ..."""
    return check == item or check.startswith(f"{item}.")


class BundleCollector(pytest.Collector):
    """One bundle; runs the check when the first of its items runs."""

    def __init__(self, *, folder: Path, **options: Any) -> None:
        super().__init__(**options)
        self.folder = folder
        self._report: ParityReport | None = None
        self.add_marker(MARKER)

    def collect(self) -> Iterator[pytest.Item]:
        """One item per check that the bundle will get; the manifest alone is read."""
        from edgelm.bundle import Bundle
        from edgelm.errors import EdgeLMError

        try:
            model = Bundle.open(self.folder).manifest.model
        except EdgeLMError as error:
            raise pytest.UsageError(f"--edgelm-bundle: {error}") from error
        for name in item_names(model, self.config.getoption("--edgelm-max-kl")):
            yield CheckItem.from_parent(self, name=name)

    def report(self) -> ParityReport:
        """The bundle's report, made once."""
        if self._report is None:
            from edgelm.parity.check import check_parity

            threads, max_kl = (self.config.getoption(f"--edgelm-{name}") for name in ("threads", "max-kl"))
            self._report = check_parity(self.folder, threads=threads, max_kl=max_kl)
            self.config.stash[_LOSSES].append((self.folder, self._report.float_loss))
        return self._report


class CheckFailedError(Exception):
    """Some checks of an item failed; carries them for the failure's text."""

    def __init__(self, report: ParityReport, checks: list[Check]) -> None:
        super().__init__(", ".join(check.name for check in checks))
        self.report = report
        self.checks = checks


class CheckItem(pytest.Item):
    """The checks of one name, see `stands_for`."""

    def runtest(self) -> None:
        """Fail if one of the checks failed, skip if none could be judged."""
        assert isinstance(self.parent, BundleCollector)
        report = self.parent.report()
        checks = [check for check in report.checks if stands_for(self.name, check.name)]
        failed = [check for check in checks if check.passed is False]
        if failed:
            raise CheckFailedError(report, failed)
        if all(check.passed is None for check in checks):
            pytest.skip("; ".join(check.detail for check in checks) or f"{self.name} could not be checked here")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The failed checks with their numbers instead of a traceback."""
        if not isinstance(excinfo.value, CheckFailedError):
            return super().repr_failure(excinfo, style)
        lines = []
        for check in excinfo.value.checks:
            numbers = "" if check.value is None else f": measured {check.value:.4g}, limit {check.limit:.4g}"
            lines.append(f"{check.title}{numbers}" + (f" ({check.detail})" if check.detail else ""))
        if excinfo.value.report.cause:
            lines.append(f"first difference: {excinfo.value.report.cause}")
        return "\n".join(lines)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where the item comes from and what it is called."""
        assert isinstance(self.parent, BundleCollector)
        return self.parent.folder, None, f"parity of {self.parent.folder}: {self.name}"
