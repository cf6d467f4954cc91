"""Every setting of Maskwatch, read from the environment (prefix MASKWATCH_, sections joined by `__`).

For example MASKWATCH_DATABASE__URL or MASKWATCH_LEDGER__LEASE_SECONDS. A setting without a value here falls
back to the embedded stack of this machine (`common/local`). Secrets come from the environment, or from the files in
the folder MASKWATCH_SECRETS_DIR (named like the variables), and print as asterisks.
"""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, FilePath, SecretStr, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    NestedSecretsSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from common.domain import MaskwatchError, PausePolicy, SampleMode

#: Earlier variable → the section and the field that it sets now. It works in this version, with a warning, and only in
#: the environment; the next version ignores it.
_EARLIER_NAMES = {
    "MASKWATCH_DISPATCH__LOOK_SECONDS": ("dispatch", "poll_seconds"),
    "MASKWATCH_DISPATCH__LOOK_LEASE_SECONDS": ("dispatch", "poll_lease_seconds"),
    "MASKWATCH_WORKER__READ_AHEAD": ("worker", "prefetch_objects"),
    "MASKWATCH_WORKER__READ_AHEAD_BYTES": ("worker", "prefetch_bytes"),
}

_MODELS_DIR = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "maskwatch" / "models"


class DatabaseSettings(BaseModel):
    url: SecretStr | None = Field(None, description="postgresql+psycopg://...; unset: the embedded Postgres")
    password: SecretStr | None = Field(None, description="overrides the password in the URL")
    pool_size: int = Field(2, ge=1, description="connections per process; tasks of a process run one at a time")
    statement_timeout_seconds: float = Field(60.0, gt=0, description="Postgres ends a statement that takes longer")
    connect_timeout_seconds: int = Field(5, ge=1, description="how long to wait for a connection to Postgres")
    by_key: bool = Field(
        False,
        description="plan each statement once, for lookups of a few rows by key; `maskwatch worker` turns it on",
    )

    @model_validator(mode="after")
    def _belongs_together(self) -> DatabaseSettings:
        if self.url is None and self.password is not None:
            raise ValueError("MASKWATCH_DATABASE__PASSWORD is set, but MASKWATCH_DATABASE__URL is not: set it, too")
        return self


class BrokerSettings(BaseModel):
    url: SecretStr | None = Field(
        None, description="redis://..., rediss://... (TLS) or redis+socket://...; unset: the embedded Redis"
    )
    username: str | None = Field(None, description="overrides the user in the URL")
    password: SecretStr | None = Field(None, description="overrides the URL's; read again for every connection")
    ca_file: FilePath | None = Field(None, description="PEM: the authorities to trust; unset: the system's")
    certificate_file: FilePath | None = Field(
        None, description="PEM: the client certificate, if the broker asks for one"
    )
    key_file: FilePath | None = Field(None, description="PEM: the certificate's key, if it is in another file")
    check_hostname: bool = Field(True, description="whether the broker's certificate must name the URL's host")
    socket_timeout_seconds: float = Field(10.0, gt=0, description="how long to wait for an answer of Redis")

    @model_validator(mode="after")
    def _belongs_together(self) -> BrokerSettings:
        if self.url is None and (self.username or self.password):
            # The embedded Redis asks for no password: only this user can reach it.
            raise ValueError(
                "MASKWATCH_BROKER__USERNAME or __PASSWORD is set, but MASKWATCH_BROKER__URL is not: set it, too"
            )
        if self.key_file is not None and self.certificate_file is None:
            raise ValueError("MASKWATCH_BROKER__KEY_FILE needs MASKWATCH_BROKER__CERTIFICATE_FILE")
        return self


class StorageSettings(BaseModel):
    """S3 is configured by the usual AWS variables; these only add to them."""

    endpoint_url: str | None = Field(None, description="an S3-compatible server; unset: AWS")
    max_object_bytes: int = Field(100 * 2**20, gt=0, description="a larger image object is quarantined unread")
    max_video_bytes: int = Field(2**40, gt=0, description="a larger video object is quarantined unread")
    requester_pays: bool = Field(False, description="pay for reading from requester-pays buckets")
    restore_check_seconds: float = Field(
        3600.0, gt=0, description="how often to check whether a requested archived object is restored"
    )
    restore_wait_seconds: float = Field(
        5 * 86400.0, gt=0, description="a requested archived object that is not restored by then is quarantined"
    )
    list_page_size: int = Field(1000, ge=1, le=1000, description="objects per page of a listing")
    block_bytes: int = Field(256 * 1024, ge=4096, description="videos are read in blocks of this size")
    cached_blocks: int = Field(64, ge=4, description="blocks kept in memory for each video being read")
    block_tries: int = Field(4, ge=1, description="tries at one block before the job is retried later")
    connect_timeout_seconds: float = Field(5.0, gt=0, description="how long to wait for a connection to S3")
    read_timeout_seconds: float = Field(30.0, gt=0, description="how long to wait for S3 to send something")


class PipelineSettings(BaseModel):
    """What a new backfill pins into its pipeline. Sizes in pixels."""

    detector: str = Field("centerface", description="a model's NAME, or NAME@SHA256 of the file you have")
    classifier: str = Field("efficientnet-lite0", description="the same for the classifier")
    detector_threshold: float | None = Field(None, gt=0, lt=1, description="unset: the detector's own")
    enlarge_below_px: int = Field(800, ge=0, description="an image whose longer side has fewer pixels is enlarged")
    enlarge_limit: float = Field(2.0, ge=1, description="the largest factor by which an image is enlarged")
    # Larger inputs cost memory: CenterFace takes about 0.27 kB per pixel, 0.7 GB for 1600 × 1600.
    shrink_above_px: int = Field(1600, ge=64, description="an image whose longer side has more pixels is shrunk")
    widen_below_px: int = Field(90, ge=0, description="the crop of a smaller face is widened before classification")
    widen_factor: float = Field(1.25, ge=1, description="the factor by which that crop is widened")
    uncertain_below: float = Field(
        0.6, ge=0.5, le=1, description="a face whose larger probability is below this is uncertain"
    )
    sample_fps: float = Field(1.0, gt=0, le=240, description="frames analysed per second of video")
    sample: SampleMode = Field(
        SampleMode.FRAMES, description="frames; or keyframes: cheaper, but only as many as the video has"
    )


class WorkerSettings(BaseModel):
    processes: int = Field(1, ge=1, description="child processes of one worker")
    threads: int | None = Field(None, ge=1, description="threads per model runtime; unset: cores // processes")
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:n")
    runtime: Literal["onnx", "native"] = Field("onnx", description="ONNX Runtime, or torch and TensorFlow themselves")
    # Decoding takes up to 16 bytes per pixel of an image (WebP), and 37 per pixel of a frame (H.264 with 16 reference
    # frames): with these limits a process, with its models, stays below 3 GB. 8K video has 33 megapixels.
    max_image_pixels: int = Field(64_000_000, gt=0, description="a larger image is quarantined without decoding it")
    max_frame_pixels: int = Field(36_000_000, gt=0, description="a video with larger frames is quarantined undecoded")
    max_faces: int = Field(
        10_000, gt=0, description="an image or frame with more faces is quarantined as no photograph"
    )
    max_frames: int = Field(100_000, gt=0, description="a video job that would analyse more frames is quarantined")
    max_video_seconds: float = Field(
        7 * 86400.0, gt=0, allow_inf_nan=False, description="a longer video is quarantined"
    )
    chunk_seconds: float = Field(
        60.0,
        ge=1,
        allow_inf_nan=False,
        description="length of a video's jobs; a track ends with its job, faces stay the same",
    )
    frame_buffer_bytes: int = Field(128 * 2**20, gt=0, description="limit for decoded frames in memory")
    batch_frames: int = Field(16, ge=1, description="most video frames of one size analysed together")
    group_size: int = Field(16, ge=1, le=256, description="image jobs per message")
    record_seconds: float = Field(1.0, ge=0, description="how often the results of analysed images are stored")
    prefetch_objects: int = Field(4, ge=0, description="objects to prefetch while one is analysed")
    prefetch_bytes: int = Field(64 * 2**20, ge=0, description="limit for the sizes of prefetched objects together")
    soft_time_limit_seconds: int = Field(
        900, ge=1, description="per message; then images not begun are released, and a chunk is tried once more"
    )
    hard_time_limit_seconds: int = Field(960, ge=1, description="per message; then the child process is killed")
    max_tasks_per_child: int = Field(10_000, ge=1, description="messages after which a child process is replaced")
    max_memory_per_child_mb: int = Field(1500, ge=100, description="a child process that uses more is replaced")


class LedgerSettings(BaseModel):
    lease_seconds: float = Field(60.0, gt=0, description="a job whose lease is not renewed for this long is recovered")
    heartbeat_seconds: float = Field(
        15.0, gt=0, description="how often a lease is renewed; well under a third of lease_seconds"
    )
    stall_seconds: float = Field(
        300.0, gt=0, description="after this long without progress a lease is no longer renewed"
    )
    max_attempts: int = Field(10, ge=1, description="tries at a transient error before quarantine")
    max_crashes: int = Field(3, ge=1, description="crashes while no other job ran beside it, before quarantine")
    max_lost_leases: int = Field(10, ge=1, description="expired leases of unknown cause before quarantine")
    retry_base_seconds: float = Field(2.0, gt=0, description="longest wait before the first new try; then doubled")
    retry_cap_seconds: float = Field(300.0, gt=0, description="longest wait between two tries")
    pause_after_refusals: int = Field(
        8, ge=1, description="refusals in a row, without a success in between, that pause a source"
    )
    pause_seconds: float = Field(
        30.0, gt=0, description="wait before a paused source is first tried again; then doubled"
    )
    pause_cap_seconds: float = Field(600.0, gt=0, description="the longest wait between two trials")
    overdue_seconds: float = Field(
        30.0, gt=0, description="a job queued for longer while its queue is empty is taken for lost"
    )
    lost_seconds: float = Field(
        3600.0, gt=0, description="a job queued for longer is taken for lost, whatever its queue holds"
    )

    @property
    def pause_policy(self) -> PausePolicy:
        return PausePolicy(self.pause_after_refusals, self.pause_seconds, self.pause_cap_seconds)


class DispatchSettings(BaseModel):
    queue_cap: int = Field(64, ge=1, description="most messages in Redis per lane")
    backfill_share: float = Field(
        0.1, gt=0, lt=1, description="share of backfills in the messages sent while live footage keeps all workers busy"
    )
    interval_seconds: float = Field(1.0, gt=0, description="how often pending jobs are sent")
    reconcile_seconds: float = Field(5.0, gt=0, description="how often lost jobs are recovered")
    summarize_seconds: float = Field(5.0, gt=0, description="how often a summary of changed hours is asked for")
    poll_lease_seconds: float = Field(
        120.0, gt=0, description="another producer takes over a camera's poll that registers nothing for this long"
    )
    poll_seconds: float = Field(5.0, gt=0, description="how often to check whether a camera is due for a poll")


class MetricsSettings(BaseModel):
    port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="port where a producer, worker or aggregator serves its metrics; unset or 0: no metrics",
    )
    host: str = Field("127.0.0.1", description="address the metrics port listens on; 0.0.0.0: all addresses")


class _EarlierVariables(PydanticBaseSettingsSource):
    """Reads the variables that are set under their earlier names, with a warning for each."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return None, field_name, False  # a part of the base class's interface; `__call__` below does not need it

    def __call__(self) -> dict[str, Any]:
        found: dict[str, dict[str, str]] = {}
        for earlier, (section, field) in _EARLIER_NAMES.items():
            if earlier in os.environ:
                found.setdefault(section, {})[field] = os.environ[earlier]
                renamed = f"MASKWATCH_{section}__{field}".upper()
                print(f"warning: {earlier} is now {renamed}; the next version ignores {earlier}", file=sys.stderr)
        return found


class Settings(BaseSettings):
    """All settings. `get_settings()` reads them once per process."""

    model_config = SettingsConfigDict(
        env_prefix="MASKWATCH_",
        env_nested_delimiter="__",
        nested_model_default_partial_update=True,
        extra="ignore",
        # An error names the setting and not its value, which may be a secret.
        hide_input_in_errors=True,
    )

    operator: str | None = Field(None, description="who gives commands, as recorded with them; unset: user@host")
    state_dir: Path = Field(Path(".maskwatch"), description="where the embedded stack keeps its state")
    models_dir: Annotated[Path, AfterValidator(Path.expanduser)] = Field(
        _MODELS_DIR, description="where pulled and imported model files are kept"
    )
    database: DatabaseSettings = DatabaseSettings()
    broker: BrokerSettings = BrokerSettings()
    storage: StorageSettings = StorageSettings()
    pipeline: PipelineSettings = PipelineSettings()
    worker: WorkerSettings = WorkerSettings()
    ledger: LedgerSettings = LedgerSettings()
    dispatch: DispatchSettings = DispatchSettings()
    metrics: MetricsSettings = MetricsSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the environment first, then MASKWATCH_SECRETS_DIR: one file per setting, named like its variable."""
        earlier = _EarlierVariables(settings_cls)
        folder = os.environ.get("MASKWATCH_SECRETS_DIR")
        if not folder:
            return init_settings, env_settings, earlier
        secrets = NestedSecretsSettingsSource(file_secret_settings, secrets_dir=folder, secrets_dir_missing="error")
        return init_settings, env_settings, secrets, earlier


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The settings of this process. Raises `MaskwatchError` if they can't be read, and pydantic's `ValidationError`
    for an invalid value."""
    try:
        return Settings()
    except (SettingsError, OSError) as error:
        # "from None": the original error may hold the text that could not be parsed.
        raise MaskwatchError(f"the settings can't be read: {error}") from None
