"""Options of verbs that can run on a Ray cluster."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import click

from edgelm.cli.common.help import Group, option
from edgelm.cli.common.options import Command, as_usage, together


class ClusterAddress(click.ParamType[str]):
    """The address of a Ray cluster. A file after `--ray` is taken for one, which the error says."""

    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the address unchanged."""
        from edgelm.serving.ray.cluster import check_address

        with as_usage():
            return check_address(value)


class Replicas(click.ParamType[Any]):
    """A number of replicas; where `range` is allowed, also MIN-MAX."""

    name = "replicas"

    def __init__(self, *, range: bool) -> None:  # noqa: A002 - what is allowed
        self._range = range

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number, or the least and the most."""
        found = re.fullmatch(r"([1-9]\d{0,4})(?:-([1-9]\d{0,4}))?", str(value))
        if found is None or (found[2] is not None and (not self._range or int(found[1]) > int(found[2]))):
            self.fail(f"{value!r} is no number of replicas{': write 4, or 1-8' if self._range else ''}", param, ctx)
        return int(found[1]) if found[2] is None else (int(found[1]), int(found[2]))


def _chosen_cluster(address: str | None, replicas: Any) -> dict[str, Any] | None:
    """Return the address and the number of replicas; None without --ray.

    Raises:
        click.UsageError: --replicas stands without --ray.
        EdgeLMError: Ray is not installed.
    """
    if address is None:
        if replicas is not None:
            raise click.UsageError("--replicas: only with --ray")
        return None
    from edgelm.serving.ray.cluster import need_ray

    need_ray()
    return {"address": address, "replicas": replicas}


def cluster_options(*, scaling: bool) -> Callable[[Command], Command]:
    """--ray and --replicas: the parameter `cluster`, None without --ray. `scaling`: whether replicas may be MIN-MAX."""
    more = "; MIN-MAX: by how many requests there are" if scaling else ""
    return together(
        "cluster",
        option(
            "--ray", "address", group=Group.CLUSTER, metavar="[ADDRESS]", type=ClusterAddress(),
            is_flag=False, flag_value="local", default_text="this process",
            help="Use the Ray cluster at ADDRESS, which is auto or HOST:PORT; without ADDRESS, one that is made on "
            "this machine. Every machine needs the bundles at the same paths.",
        ),
        option(
            "--replicas", group=Group.CLUSTER, metavar="MIN-MAX" if scaling else "N", type=Replicas(range=scaling),
            default_text="one a GPU, or one a machine",
            help=f"How many processes load the models{more}.",
        ),
        make=_chosen_cluster,
    )  # fmt: skip
