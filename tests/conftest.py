"""Fixtures that more than one folder of tests uses."""

# Each behind those that it imports, as pytest wants to see a plugin first.
pytest_plugins = [
    "tests.namespaces",
    "tests.etcd_cluster",
    "tests.cluster_of_three",
    "tests.mounts",
    "tests.raw_peer",
    "tests.rooms",
    "tests.zfs",
]
