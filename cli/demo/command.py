"""`pmgcm demo`: sets a cluster up on this machine, writes mail on every node, and compares all tables at the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from cli.console import CommandFailedError, note, say, say_json
from pmgsync.errors import ConfigError, PmgsyncError

if TYPE_CHECKING:
    from cli.demo.cluster import DemoCluster
    from cli.demo.display import Display
    from cli.demo.failover import Failover
    from cli.demo.latency import Latency, Watcher
    from cli.demo.machine import DemoNode
    from cli.demo.traffic import Writer

_Thread: TypeAlias = "Writer | Watcher | Failover"
REFRESH_S = 0.5
WAIT_S = 120
DRAIN_S = 10.0
MAX_NODES = 16


def demo(
    nodes: Annotated[int, typer.Option(min=1, max=MAX_NODES, help="Number of nodes")] = 3,
    seconds: Annotated[float, typer.Option(min=1.0, help="How long mail is written")] = 20.0,
    rate: Annotated[float, typer.Option(min=0.1, max=10_000.0, help="Mails per second on each node")] = 25.0,
    failover: Annotated[
        bool,
        typer.Option("--failover", help="Lose the master in the middle, promote another node, bring the old one back"),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON (contract: README.md)")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the cluster running at the end")] = False,
) -> None:
    """Run a whole cluster on this machine, with mail traffic on every node. Exit code 0 only when all are equal."""
    from cli.demo.cluster import DemoCluster

    if failover and nodes < 2:
        raise ConfigError("a failover needs at least two nodes", hint="add --nodes 3")
    _require_postgres()
    with DemoCluster(nodes, note) as cluster:
        try:
            summary, differing = _run(cluster, seconds, rate, failover=failover)
        except PmgsyncError:
            for line in cluster.log_tails():
                note(line)
            raise
        if as_json:
            say_json(summary)
        else:
            say(render_summary(summary))
        for line in differing:
            note(f"error: {line}")
        if differing:
            for line in cluster.log_tails():
                note(line)
        if keep:
            _tell_how_to_go_on(cluster, cluster.keep())
    if differing:
        raise CommandFailedError


def _require_postgres() -> None:
    """Refuse before anything was started when there is no PostgreSQL for it.

    Raises:
        ConfigError: when there is none.
    """
    from pmgsync.postgres.programs import find_binaries

    find_binaries()


def _run(cluster: DemoCluster, seconds: float, rate: float, *, failover: bool) -> tuple[dict[str, Any], list[str]]:
    """Run the demo on a started cluster; returns the summary and what is not equal at the end.

    Raises:
        PmgsyncError: when something failed on the way.
    """
    from cli.demo.compare import differences, read_contents
    from cli.demo.failover import Failover, count_exported
    from cli.demo.latency import Latency
    from cli.demo.traffic import newest_mails, write_history
    from cli.demo.trees import change_configuration, compare_trees, follow_change, show_mail, write_configuration
    from pmgsync.profile_file import load_profile

    begun = time.monotonic()
    write_history(cluster.nodes[0].dsn)
    write_configuration(cluster.nodes[0])
    cluster.define()
    _await_in_sync(cluster)
    set_up = time.monotonic() - begun
    latency = Latency(_cids(cluster))
    note(f"writing {rate:g} mails per second on each node for {seconds:g} s")
    stop = threading.Event()
    course = Failover(cluster, latency, seconds, rate, stop) if failover else None
    written = time.monotonic()
    writers = _write(cluster, latency, seconds, rate, stop, course)
    written = time.monotonic() - written
    master = cluster.nodes[1 if failover else 0]
    begun = time.monotonic()
    note("changing the master's configuration files")
    change_configuration(master)
    for line in follow_change(cluster.nodes):
        note(f"  {line}")
    note("pmgcm wait")
    cluster.pmgcm(master, "wait", "--timeout", str(WAIT_S), timeout_s=WAIT_S + 60)
    waited = time.monotonic() - begun
    note("comparing all synchronised tables on all nodes")
    profile = load_profile("pmg")
    contents = {node.name: read_contents(node.dsn, profile) for node in cluster.nodes}
    note("comparing configuration and quarantine files on all nodes")
    files, differing_files = compare_trees(cluster.nodes)
    for file in newest_mails(cluster.nodes[-1].dsn):
        note(f"  {show_mail(cluster.nodes, file)}")
    differing = [*differences(contents), *differing_files]
    tables = contents[cluster.nodes[0].name]
    summary = {
        "nodes": cluster.count,
        "seconds": round(written, 1),
        "mails": sum(writer.done for writer in writers if writer.counts_mail),
        "rows": sum(writer.rows for writer in writers),
        **latency.summary(),
        "set_up_s": round(set_up, 1),
        "wait_s": round(waited, 1),
        "tables": len(tables),
        "rows_compared": sum(content.rows for content in tables.values()),
        "files_compared": files,
        "equal": not differing,
        "differences": differing,
        "failover": None if course is None else {**course.result, "exported": count_exported(cluster)},
    }
    return summary, differing


def _cids(cluster: DemoCluster) -> Sequence[int]:
    """`create` gives CID 1, and each `join` the next one."""
    return range(1, cluster.count + 1)


def _write(
    cluster: DemoCluster, latency: Latency, seconds: float, rate: float, stop: threading.Event, course: Failover | None
) -> Sequence[Writer]:
    """Write on all nodes for a while and show how it goes; returns the writers, which have ended.

    Args:
        stop: set when the time is over, or the failover.
        course: what happens meanwhile.

    Raises:
        PmgsyncError: when one of them failed.
    """
    from cli.demo.display import Display
    from cli.demo.latency import Watcher
    from cli.demo.traffic import MailWriter, RuleWriter

    cids = _cids(cluster)
    stop_watching = threading.Event()
    with ExitStack() as stack:
        stack.callback(stop_watching.set)
        stack.callback(stop.set)
        watchers = [
            Watcher(node.dsn, cid, [other for other in cids if other != cid], latency, stop_watching)
            for cid, node in zip(cids, cluster.nodes, strict=True)
            if cluster.count > 1
        ]
        mails = [MailWriter(node, cid, rate, stop, latency) for cid, node in zip(cids, cluster.nodes, strict=True)]
        rules = RuleWriter(cluster.nodes[0].dsn, cids[0], stop)
        writers: list[Writer] = [*mails, rules]
        for thread in (*watchers, *writers):
            thread.start()
        begun = time.monotonic()
        if course is not None:
            course.watch(rules, [mails[0], watchers[0]])
            course.start()
        else:
            timer = threading.Timer(seconds, stop.set)
            timer.daemon = True
            stack.callback(timer.cancel)
            timer.start()

        def everybody() -> list[Writer]:
            return [*writers, *(course.writers if course is not None else ())]

        def threads() -> Sequence[_Thread]:
            return [*watchers, *everybody(), *([course] if course is not None else [])]

        def progress() -> str:
            figures = latency.summary()
            lag = "" if figures["lag_median_ms"] is None else f", lag median {figures['lag_median_ms']:.0f} ms"
            done = sum(writer.done for writer in everybody() if writer.counts_mail)
            return f"{time.monotonic() - begun:.0f} s: {done} mails{lag}"

        with Display() as display:
            seen = cluster.nodes[0 if course is None else 1]
            _show_until(seen, display, progress, stop.is_set, threads)
            for writer in everybody():
                writer.join()
            drained = time.monotonic() + DRAIN_S
            _show_until(seen, display, progress, lambda: not latency.waiting or time.monotonic() >= drained, threads)
        stop_watching.set()
        for watcher in watchers:
            watcher.join()
    return everybody()


def _show_until(
    node: DemoNode,
    display: Display,
    progress: Callable[[], str],
    over: Callable[[], bool],
    threads: Callable[[], Sequence[_Thread]],
) -> None:
    """Show the status of a node again and again until it is over, or a thread has failed.

    Raises:
        PmgsyncError: when one has.
    """
    from cli.local_node import read_status
    from pmgsync.config import load_config
    from pmgsync.errors import UnreachableError
    from pmgsync.wire.link import BrokerLink

    config = load_config(Path(node.config))
    with BrokerLink(config.broker_socket, "cli") as link:
        link.hello()
        while True:
            is_over = over()
            for thread in threads():
                if thread.error:
                    raise PmgsyncError(thread.error)
            if is_over:
                return
            try:
                display.show(read_status(link), progress())
            except UnreachableError:
                display.show(None, progress())
            time.sleep(REFRESH_S)


def _await_in_sync(cluster: DemoCluster) -> None:
    """Wait until every node is connected and has all of the others' changes.

    Raises:
        PmgsyncError: when that takes too long.
    """
    cluster.pmgcm(cluster.nodes[0], "wait", "--timeout", str(WAIT_S), timeout_s=WAIT_S + 60)


def render_summary(summary: dict[str, Any]) -> str:
    """Return the summary for a person."""
    from cli.demo.failover import render as render_failover

    lag = (
        "no other node to measure it on"
        if summary["lag_median_ms"] is None
        else f"median {summary['lag_median_ms']:.1f} ms, 99th percentile {summary['lag_p99_ms']:.1f} ms "
        f"({summary['lag_samples']} samples, from commit to visible on another node)"
    )
    verdict = "equal on all nodes" if summary["equal"] else "NOT equal"
    failover = [] if summary["failover"] is None else [render_failover(summary["failover"])]
    return "\n".join(
        [
            f"nodes    {summary['nodes']}",
            f"mails    {summary['mails']} in {summary['seconds']:g} s",
            f"rows     {summary['rows']} written",
            f"lag      {lag}",
            f"tables   {summary['tables']} compared, {summary['rows_compared']} rows: {verdict}",
            f"files    {summary['files_compared']} compared: {verdict}",
            *failover,
        ]
    )


def _tell_how_to_go_on(cluster: DemoCluster, holder: int) -> None:
    note(f"the cluster goes on running, below {cluster.directory}; for example:")
    for node in cluster.nodes[:2]:
        note(f"  pmgcm --config {node.config} status")
    note(f'  psql "{cluster.nodes[0].dsn}"')
    note(f"stop and remove it: kill {holder}")
