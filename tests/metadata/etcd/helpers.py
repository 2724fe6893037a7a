"""Keys of a real etcd, as they are and as they must be."""

from __future__ import annotations

from imgsvc.etcd_messages import Etcd3Client

SOURCE = "http://source.example/ä.gz"
# As `openssl dgst -sha256` has it.
SOURCE_SHA256 = "860a4d1e9497dc204ad1a93872854c7bba2aed64769019faf2949bae26368d3a"


class Raw:
    """Keys and values as they are, read and written past the store."""

    def __init__(self, endpoint: str, prefix: str) -> None:
        host, port = endpoint.removeprefix("http://").split(":")
        self.client = Etcd3Client(host=host, port=int(port), timeout=5)
        self.prefix = prefix

    def all(self) -> dict[str, str]:
        """Everything of images under the prefix, which the keys here are without."""
        found = self.client.get_prefix(self.prefix)
        values = {about.key.decode().removeprefix(self.prefix): value.decode() for value, about in found}
        return {
            key: value for key, value in values.items() if not key.startswith(("/image-members/", "/image-records"))
        }

    def lease(self, key: str) -> int:
        return int(self.client.get(self.prefix + key)[1].lease_id)

    def put(self, key: str, value: str) -> None:
        self.client.put(self.prefix + key, value)

    def delete(self, key: str) -> None:
        assert self.client.delete(self.prefix + key)

    def close(self) -> None:
        self.client.close()
