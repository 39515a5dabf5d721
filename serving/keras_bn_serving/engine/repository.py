"""The models being served: finds their versions, loads and unloads them, and hands them out while they are in use."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType

from keras_bn_serving.config.models import ModelConfig, check_base_path
from keras_bn_serving.engine.recurring import Recurring
from keras_bn_serving.engine.servable import Servable
from keras_bn_serving.engine.versions import State, Version, files_below
from keras_bn_serving.errors import Code, FailedPreconditionError, InvalidArgumentError, NotFoundError, ServingError

_log = logging.getLogger(__name__)
# Unloaded and failed versions stay in the status; this many a model at most.
_MOST_ENDED = 100
# How often a version that waits for its last request looks whether the server stops.
_LOOK_SECONDS = 0.5
# A version that has failed is tried again when its files change, and else after so long; longer after each failure.
_LEAST_RETRY_SECONDS, _MOST_RETRY_SECONDS = 5.0, 300.0


class Lease:
    """A version in use: it stays loaded until the lease is released."""

    def __init__(self, repository: "ModelRepository", name: str, version: Version, servable: Servable):
        self.model_name = name
        self.version = version.number
        self.servable = servable
        self._repository = repository
        self._held: Version | None = version

    def release(self) -> None:
        """Gives the version back; a second call does nothing."""
        if self._held is not None:
            self._repository._release(self._held)
            self._held = None

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class ModelRepository:
    """All models and their versions.

    Args:
        load: Makes a servable, warmed up and ready, of a model's name, a version and its folder; raises a
            ServingError if it cannot.
        poll_wait_seconds: How long to wait between looks at the folders; 0 looks once.
        allow_labels_for_unavailable: Whether a label may name a version that is not loaded.
        on_failure: Told the name of a thread whose turn has failed.
    """

    def __init__(
        self,
        load: Callable[[str, int, str], Servable],
        poll_wait_seconds: float = 1.0,
        allow_labels_for_unavailable: bool = False,
        on_failure: Callable[[str], None] = lambda _: None,
    ):
        self._load = load
        self._poll_wait_seconds = poll_wait_seconds
        self._poller = Recurring("model-repository", poll_wait_seconds, self._poll, on_failure)
        self._allow_labels_for_unavailable = allow_labels_for_unavailable
        self._configs: dict[str, ModelConfig] = {}
        self._labels: dict[str, Mapping[str, int]] = {}
        self._models: dict[str, dict[int, Version]] = {}
        self._changed = threading.Condition()
        # Held while folders are looked at and versions come and go; requests never take it.
        self._managing = threading.Lock()
        self._closing = threading.Event()
        self._patience = 0.0
        self._on_failure = on_failure
        self._unloading: list[threading.Thread] = []
        self._unreadable: dict[str, str] = {}

    def start(self, configs: Iterable[ModelConfig]) -> None:
        """Loads the models and goes on to follow their folders.

        Raises:
            ServingError: If a model has no version, or one that should be served cannot be.
        """
        self.reconfigure(configs)
        if self._poll_wait_seconds > 0:
            self._poller.start()

    def reconfigure(self, configs: Iterable[ModelConfig], again: bool = True) -> None:
        """Serves these models, and no others, from now on; returns once they are loaded.

        What is new is loaded first. Where that fails, all that was served before is served as before.

        Args:
            configs: The models.
            again: Whether a version that failed a moment ago is tried again, or its time is waited for.

        Raises:
            ServingError: If a new model has no version, or one that should be served cannot be.
        """
        by_name = {config.name: config for config in configs}
        with self._managing:
            new = [config for name, config in by_name.items() if config != self._configs.get(name)]
            for config in new:
                check_base_path(config)
            try:
                for config in new:
                    self._load_all(config, again)
                for config in by_name.values():
                    self._check_labels(config)
            except (ServingError, OSError):
                self._refresh()  # Unloads what the old configuration does not want.
                raise
            self._configs = by_name
            self._labels = {config.name: dict(config.labels) for config in by_name.values()}
            self._refresh()

    def lease(self, name: str, version: int | None = None, label: str | None = None) -> Lease:
        """Takes a loaded version into use: the one asked for by number or label, else the newest.

        Raises:
            NotFoundError: If no such version is loaded.
            InvalidArgumentError: If the label is unknown.
        """
        if label is not None:
            if label not in self._labels.get(name, {}):
                raise InvalidArgumentError(f"Unrecognized servable version label: {label}")
            version = self._labels[name][label]
        with self._changed:
            newest: Version | None = None
            for each in self._models.get(name, {}).values():
                fits = each.state is State.AVAILABLE and (version is None or version == each.number)
                if fits and (newest is None or each.number > newest.number):
                    newest = each
            if newest is not None and newest.servable is not None:
                newest.in_use += 1
                return Lease(self, name, newest, newest.servable)
        asked = f"Latest({name})" if version is None else f"Specific({name}, {version})"
        raise NotFoundError(f"Servable not found for request: {asked}")

    def status(self, name: str, version: int | None = None) -> list[tuple[int, State, ServingError | None]]:
        """Returns every version of a model that is or was, newest first, or the one asked for.

        Raises:
            NotFoundError: If there is none.
        """
        found = [each for each in self.known(name) if version in (None, each[0])]
        if found:
            return found
        if version is None:
            raise NotFoundError(f"Could not find any versions of model {name}")
        raise NotFoundError(f"Could not find version {version} of model {name}")

    def known(self, name: str) -> list[tuple[int, State, ServingError | None]]:
        """Returns every version of a model that is or was, newest first; none for an unknown model."""
        with self._changed:
            versions = sorted(self._models.get(name, {}).values(), key=_newest_first)
            return [(each.number, each.state, each.error) for each in versions]

    def names(self) -> list[str]:
        """Returns the names of the models in the order configured."""
        return list(self._configs)

    def labels(self, name: str) -> Mapping[str, int]:
        """Returns the labels of a model."""
        return self._labels.get(name, {})

    def close(self, seconds: float) -> None:
        """Stops following the folders and unloads everything, what is in use after `seconds` at the latest."""
        self._patience = seconds
        self._closing.set()
        self._poller.stop()
        with self._managing:
            self._configs = {}
            self._refresh()
            unloading = self._unloading
        for thread in unloading:
            thread.join()

    def _poll(self) -> None:
        with self._managing:
            failed = self._refresh()
        for name, version in failed:
            _log.error("model %s version %d: %s", name, version.number, version.error and version.error.message)

    def _refresh(self) -> list[tuple[str, Version]]:
        """Makes what is loaded agree with the folders; a new version is up before an old one goes.

        Returns the versions that have failed just now.
        """
        failed = []
        for name in {*self._configs, *self._models}:
            config = self._configs.get(name)
            try:
                folders = config.find_versions() if config else {}
            except OSError as error:
                # Said once, and not at each poll.
                if self._unreadable.get(name) != str(error):
                    self._unreadable[name] = str(error)
                    _log.warning("model %s: cannot read its folder, keeping what is loaded: %s", name, error)
                continue
            if self._unreadable.pop(name, None):
                _log.info("model %s: its folder can be read again", name)
            aspired = config.policy.aspired(folders) if config else []
            for number in aspired:
                version = self._load_if_needed(name, number, folders[number])
                if version is not None and version.error is not None:
                    failed.append((name, version))
            known = self._models.get(name, {})
            ready = [number for number in aspired if number in known and known[number].state is State.AVAILABLE]
            if ready or not aspired:
                for version in [each for each in known.values() if each.number not in aspired]:
                    self._unload(name, version)
            self._forget(name, aspired)
        return failed

    def _load_all(self, config: ModelConfig, again: bool) -> None:
        """Loads the versions of a configuration that are not loaded; raises the first error."""
        folders = config.find_versions()
        for number in config.policy.aspired(folders):
            self._load_if_needed(config.name, number, folders[number], again)
            error = self._models[config.name][number].error
            if error is not None:
                raise ServingError(
                    f"Model {config.name} version {number} cannot be served: {error.message}", error.code
                )

    def _load_if_needed(self, name: str, number: int, path: str, again: bool = False) -> Version | None:
        """Loads a version that is not loaded, and not known to fail or to be tried `again`; returns it if tried."""
        known = self._models.setdefault(name, {})
        last = known.get(number)
        # One that is being unloaded, and wanted again, is loaded beside it.
        if last is not None and last.state not in (State.UNLOADING, State.END):
            return None
        # Before it is loaded: of a version that is just being copied, more may come meanwhile.
        files = files_below(path)
        failed = last is not None and last.error is not None
        if last is not None and failed and not again and files == last.tried and time.monotonic() < last.retry_at:
            return None
        version = Version(number, path)
        version.tried = files
        version.failures = last.failures if last is not None and failed and files == last.tried else 0
        with self._changed:
            known[number] = version
            version.state = State.LOADING
        try:
            servable = self._load(name, number, path)
        except ServingError as error:
            failure: ServingError | None = error
        except Exception:
            _log.exception("model %s version %d: loading failed", name, number)
            failure = ServingError("Loading failed; the server's log says why.", Code.INTERNAL)
        else:
            _log.info("model %s version %d: available", name, number)
            failure = None
        with self._changed:
            if failure is None:
                version.servable, version.state = servable, State.AVAILABLE
            else:
                version.error, version.state = failure, State.END
                wait = min(_LEAST_RETRY_SECONDS * 2**version.failures, _MOST_RETRY_SECONDS)
                version.failures, version.retry_at = version.failures + 1, time.monotonic() + wait
        return version

    def _unload(self, name: str, version: Version) -> None:
        """Unloads a version once it is out of use; on a thread of its own, so that one that never is stops nothing."""
        with self._changed:
            if version.state is not State.AVAILABLE:
                return
            version.state = State.UNLOADING
        thread = threading.Thread(
            target=self._unload_unused, args=(name, version), name=f"unload-{name}-{version.number}", daemon=True
        )
        self._unloading = [each for each in self._unloading if each.is_alive()] + [thread]
        thread.start()

    def _unload_unused(self, name: str, version: Version) -> None:
        with self._changed:
            # Once the server stops, what does not end in time is cut off: closing a model cancels its runs.
            while version.in_use and not self._closing.is_set():
                self._changed.wait(_LOOK_SECONDS)
            self._changed.wait_for(lambda: version.in_use == 0, self._patience)
            servable, version.servable = version.servable, None
        try:
            if servable is not None:
                servable.close()
        except Exception:
            _log.exception("model %s version %d: could not be unloaded", name, version.number)
            self._on_failure(threading.current_thread().name)
        with self._changed:
            version.state = State.END
        _log.info("model %s version %d: unloaded", name, version.number)

    def _forget(self, name: str, aspired: list[int]) -> None:
        known = self._models.get(name, {})
        ended = sorted(number for number, each in known.items() if each.state is State.END and number not in aspired)
        with self._changed:
            for number in ended[:-_MOST_ENDED]:
                del known[number]

    def _release(self, version: Version) -> None:
        with self._changed:
            version.in_use -= 1
            if not version.in_use:
                self._changed.notify_all()

    def _check_labels(self, config: ModelConfig) -> None:
        known = self._models.get(config.name, {})
        for number in config.labels.values():
            loaded = number in known and known[number].state is State.AVAILABLE
            if not loaded and not self._allow_labels_for_unavailable:
                raise FailedPreconditionError(
                    f"Request to assign label to version {number} of model {config.name}, which is not currently "
                    "available for inference"
                )


def _newest_first(version: Version) -> int:
    return -version.number
