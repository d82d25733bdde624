"""Requests that no client should send, and clients that vanish; R16 is a row of the table in docs/reliability.md."""

from studies import hostile_clients, reliability


def test_hostile_requests(tmp_path):
    reliability.sound(hostile_clients.hostile_requests(tmp_path, 500))  # R16
