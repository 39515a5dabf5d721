"""Which models to serve, and which of their versions: the part of the configuration that may change while serving."""

import functools
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from keras_bn_serving.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError

_log = logging.getLogger(__name__)
_VERSION = re.compile(r"\d+")
_LARGEST_VERSION = 2**63 - 1


@dataclass(frozen=True)
class VersionPolicy:
    """Which of the versions that exist should be loaded.

    Attributes:
        latest: How many of the newest, where neither `all` nor `specific` is set.
        all: Every one.
        specific: These, where it is not `None`.
    """

    latest: int = 1
    all: bool = False
    specific: tuple[int, ...] | None = None

    def aspired(self, versions: Iterable[int]) -> list[int]:
        """Returns the versions to be loaded, newest first."""
        newest_first = sorted(versions, reverse=True)
        if self.all:
            return newest_first
        if self.specific is not None:
            return [version for version in newest_first if version in self.specific]
        return newest_first[: self.latest]


@dataclass(frozen=True)
class ModelConfig:
    """One model to serve.

    Attributes:
        name: The name in requests.
        base_path: The folder whose numbered folders are the versions; may be given as a `file://` URL.
        policy: Which versions to load.
        labels: Names for versions.
    """

    name: str
    base_path: str
    policy: VersionPolicy = VersionPolicy()
    labels: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name:
            raise InvalidArgumentError("`name` of a model must not be empty. Received: name=''.")
        object.__setattr__(self, "base_path", self.base_path.removeprefix("file://"))

    def find_versions(self) -> dict[int, str]:
        """Returns the folders of the versions that exist now, by version.

        Raises:
            OSError: If the base path cannot be read.
        """
        versions: dict[int, str] = {}
        with os.scandir(self.base_path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if not _VERSION.fullmatch(entry.name):
                    continue
                number = int(entry.name)
                if number > _LARGEST_VERSION:
                    _tell_once(entry.path, f"a version is {_LARGEST_VERSION} at most")
                elif not entry.is_dir():
                    _tell_once(entry.path, "it is no folder")
                elif number in versions:
                    _tell_once(entry.path, f"{versions[number]} is version {number} already")
                else:
                    versions[number] = entry.path
        return versions


@functools.cache
def _tell_once(path: str, why: str) -> None:
    """Logs what is not served, though it is named as a version is; not again at the next look."""
    _log.warning("%s is not served: %s", path, why)


def check_base_path(config: ModelConfig) -> None:
    """Says what is missing, unless the model has a version to serve.

    Raises:
        NotFoundError: If there is no version, or no such folder: it may come.
        FailedPreconditionError: If the folder is a version itself.
    """
    if not os.path.isdir(config.base_path):
        problem = "is not a folder" if os.path.exists(config.base_path) else "does not exist"
        raise NotFoundError(f"Model {config.name}: the base path {config.base_path} {problem}.")
    if not config.policy.aspired(config.find_versions()):
        nothing = f"Model {config.name}: no version found below {config.base_path}"
        if os.path.exists(os.path.join(config.base_path, "saved_model.pb")):
            raise FailedPreconditionError(
                f"{nothing}: it holds a SavedModel itself; move it into a numbered folder, such as 1, below."
            )
        raise NotFoundError(f"{nothing}: every version needs a folder with a number as its name, such as 1.")
