"""Fixtures that more than one folder of tests uses."""

pytest_plugins = ["tests.etcd_cluster", "tests.mounts", "tests.raw_peer", "tests.rooms", "tests.zfs"]
