"""Figures for Prometheus, in its text format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from daemon.answers import Status

STATES = ("working", "stopped", "waiting", "paused", "idle", "stopping")


def exposition(status: Status, queue: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the figures that a status and a queue hold."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import GaugeMetricFamily

    class Collector:
        def collect(self) -> Iterator[Any]:
            state = GaugeMetricFamily("nightpress_state", "1 for the state of the service.", labels=["state"])
            for name in STATES:
                state.add_metric([name], float(name == status.state))
            yield state
            yield GaugeMetricFamily("nightpress_uptime_seconds", "Since the service started.", status.uptime_s)
            yield GaugeMetricFamily("nightpress_queue_jobs", "Jobs that wait or are in work.", len(queue))
            healthy = float(not status.conditions)
            yield GaugeMetricFamily("nightpress_healthy", "1 when no condition is raised.", healthy)
            sensors = GaugeMetricFamily("nightpress_sensor_value", "Latest reading.", labels=["sensor", "unit"])
            for found in status.sensors:
                if found.value is not None:
                    sensors.add_metric([found.sensor, found.unit], found.value)
            yield sensors
            if status.job is not None:
                share = GaugeMetricFamily("nightpress_job_share", "Share of the job in work, 0 to 1.", labels=["model"])
                share.add_metric([status.job.name], status.job.share)
                yield share
            if status.release is not None:
                release = GaugeMetricFamily("nightpress_release_bytes", "Size of the last release.",
                                            labels=["model", "level", "release"])
                release.add_metric([status.release.model, status.release.level, str(status.release.number)],
                                   status.release.bytes)
                yield release

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector())
    return bytes(generate_latest(registry))
