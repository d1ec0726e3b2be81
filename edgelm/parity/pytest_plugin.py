"""`pytest --edgelm-bundle DIR`: run the parity check as tests, one per check.

Without the option nothing else is imported. The tests come after those that pytest collects and have the marker
`edgelm_bundle`, so that `-m edgelm_bundle` runs them alone.
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
        help="check that this device computes the same model as this bundle's reference; may be repeated",
    )
    group.addoption("--edgelm-threads", type=int, default=None, metavar="N", help="threads for --edgelm-bundle")
    group.addoption(
        "--edgelm-max-kl",
        type=float,
        default=None,
        metavar="NATS",
        help="fail if the mean KL of a bundle to its float model is larger; otherwise the loss is only printed",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker, so that --strict-markers accepts `-m edgelm_bundle`."""
    config.stash[_LOSSES] = []
    config.addinivalue_line("markers", f"{MARKER}: the parity check of a bundle given with --edgelm-bundle")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Append the tests of every bundle. This hook runs first, so that -k and -m apply to them too."""
    for folder in config.getoption("--edgelm-bundle"):
        items.extend(BundleCollector.from_parent(session, name=f"parity:{folder}", folder=Path(folder)).collect())


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the loss of each bundle against its float model, which is not a test."""
    for folder, loss in config.stash[_LOSSES]:
        terminalreporter.write_line(f"{folder}: lost against the float model: {loss.text}")
        if loss.warning:
            terminalreporter.write_line(f"{folder}: warning: {loss.warning}", yellow=True)


def item_names(model: ModelInfo, max_kl: float | None) -> list[str]:
    """Return the names of the tests of a bundle; together they cover every check."""
    names = ["integrity", "tokenizer", "logits", "perplexity", "greedy", "embedding"]
    for layer in range(model.num_layers):
        names.append(f"layer[{layer}]")
        if model.num_experts:
            names.append(f"experts[{layer}]")
    return [*names, "head", *(() if max_kl is None else ("float_kl",))]


def stands_for(item: str, check: str) -> bool:
    """Return whether a test covers a check: "logits" covers logits.kl_mean, logits.top1 ..."""
    return check == item or check.startswith(f"{item}.")


class BundleCollector(pytest.Collector):
    """Collector of one bundle. The check runs when the first of its tests runs."""

    def __init__(self, *, folder: Path, **options: Any) -> None:
        super().__init__(**options)
        self.folder = folder
        self._report: ParityReport | None = None
        self.add_marker(MARKER)

    def collect(self) -> Iterator[pytest.Item]:
        """Yield one test per check of the bundle; only the manifest is read."""
        from edgelm.bundle import Bundle
        from edgelm.errors import EdgeLMError

        try:
            model = Bundle.open(self.folder).manifest.model
        except EdgeLMError as error:
            raise pytest.UsageError(f"--edgelm-bundle: {error}") from error
        for name in item_names(model, self.config.getoption("--edgelm-max-kl")):
            yield CheckItem.from_parent(self, name=name)

    def report(self) -> ParityReport:
        """Return the bundle's report, which is made once."""
        if self._report is None:
            from edgelm.parity.check import check_parity

            threads, max_kl = (self.config.getoption(f"--edgelm-{name}") for name in ("threads", "max-kl"))
            self._report = check_parity(self.folder, threads=threads, max_kl=max_kl)
            self.config.stash[_LOSSES].append((self.folder, self._report.float_loss))
        return self._report


class CheckFailedError(Exception):
    """Some checks of a test failed; holds them for the failure's text."""

    def __init__(self, report: ParityReport, checks: list[Check]) -> None:
        super().__init__(", ".join(check.name for check in checks))
        self.report = report
        self.checks = checks


class CheckItem(pytest.Item):
    """The test of some checks, see `stands_for`."""

    def runtest(self) -> None:
        """Fail if one of the checks failed; skip if none could be made."""
        assert isinstance(self.parent, BundleCollector)
        report = self.parent.report()
        checks = [check for check in report.checks if stands_for(self.name, check.name)]
        failed = [check for check in checks if check.passed is False]
        if failed:
            raise CheckFailedError(report, failed)
        if all(check.passed is None for check in checks):
            pytest.skip("; ".join(check.detail for check in checks) or f"{self.name} could not be checked here")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Return the failed checks with their numbers in place of a traceback."""
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
        """Return the location and the name of the test."""
        assert isinstance(self.parent, BundleCollector)
        return self.parent.folder, None, f"parity of {self.parent.folder}: {self.name}"
