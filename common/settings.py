"""Every setting of Maskwatch, read from the environment (prefix MASKWATCH_, sections joined by `__`).

For example MASKWATCH_DATABASE__URL or MASKWATCH_LEDGER__LEASE_SECONDS. A setting without a value here falls
back to the embedded stack of this machine (`common/local`). Secrets come from the environment, or from the files in
the folder MASKWATCH_SECRETS_DIR (named like the variables), and print as asterisks.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field, FilePath, SecretStr, model_validator
from pydantic_settings import (
    BaseSettings,
    NestedSecretsSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from common.domain import MaskwatchError, PausePolicy, SampleMode

_MODELS_DIR = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "maskwatch" / "models"


class DatabaseSettings(BaseModel):
    url: SecretStr | None = Field(None, description="postgresql+psycopg://...; unset: the embedded Postgres")
    password: SecretStr | None = Field(None, description="goes before the one in the URL, which then needs none")
    pool_size: int = Field(2, ge=1, description="connections per process; tasks of a process run one at a time")
    statement_timeout_seconds: float = Field(60.0, gt=0)
    connect_timeout_seconds: int = Field(5, ge=1)
    by_key: bool = Field(
        False,
        description="plan each statement once, for few rows that are found by their keys; `maskwatch worker` sets it",
    )

    @model_validator(mode="after")
    def _belongs_together(self) -> DatabaseSettings:
        if self.url is None and self.password is not None:
            raise ValueError("a password is set and MASKWATCH_DATABASE__URL is not")
        return self


class BrokerSettings(BaseModel):
    url: SecretStr | None = Field(
        None, description="redis://..., rediss://... (TLS) or redis+socket://...; unset: the embedded Redis"
    )
    username: str | None = Field(None, description="goes before the one in the URL, as does the password")
    password: SecretStr | None = Field(None, description="read again at every connection")
    ca_file: FilePath | None = Field(None, description="PEM; whose certificates are good. Unset: the system's")
    certificate_file: FilePath | None = Field(None, description="PEM; ours, where the broker asks for one")
    key_file: FilePath | None = Field(None, description="PEM; its key, where that is in a file of its own")
    check_hostname: bool = Field(True, description="off: a certificate of the authority for any host will do")
    socket_timeout_seconds: float = Field(10.0, gt=0)

    @model_validator(mode="after")
    def _belongs_together(self) -> BrokerSettings:
        if self.url is None and (self.username or self.password):
            # The embedded Redis asks for none: nobody else reaches it.
            raise ValueError("a user or password is set and MASKWATCH_BROKER__URL is not")
        if self.key_file is not None and self.certificate_file is None:
            raise ValueError("MASKWATCH_BROKER__KEY_FILE needs MASKWATCH_BROKER__CERTIFICATE_FILE")
        return self


class StorageSettings(BaseModel):
    """S3 is configured by the usual AWS variables; these only add to them."""

    endpoint_url: str | None = Field(None, description="an S3-compatible server; unset: AWS")
    max_object_bytes: int = Field(100 * 2**20, gt=0, description="a larger image object is quarantined unread")
    max_video_bytes: int = Field(2**40, gt=0, description="a larger video object is quarantined unread")
    requester_pays: bool = Field(False, description="pay for what is read from buckets of others that ask for it")
    restore_check_seconds: float = Field(
        3600.0, gt=0, description="how often an archived object that was asked for is tried again"
    )
    restore_wait_seconds: float = Field(
        5 * 86400.0, gt=0, description="an archived object that has not come back by then is quarantined"
    )
    list_page_size: int = Field(1000, ge=1, le=1000)
    block_bytes: int = Field(256 * 1024, ge=4096, description="videos are read in blocks of this size")
    cached_blocks: int = Field(64, ge=4, description="blocks that a video being read keeps in memory")
    block_tries: int = Field(4, ge=1, description="tries at one block before the job has to wait")
    connect_timeout_seconds: float = Field(5.0, gt=0)
    read_timeout_seconds: float = Field(30.0, gt=0)


class PipelineSettings(BaseModel):
    """What a new backfill pins into its pipeline. Sizes in pixels."""

    detector: str = Field("centerface", description="a model's NAME, or NAME@SHA256 of the file you have")
    classifier: str = Field("efficientnet-lite0", description="the same for the classifier")
    detector_threshold: float | None = Field(None, gt=0, lt=1, description="unset: the detector's own")
    enlarge_below_px: int = Field(800, ge=0)
    enlarge_limit: float = Field(2.0, ge=1)
    # Larger inputs cost memory: CenterFace takes about 0.27 kB per pixel, 0.7 GB for 1600 × 1600.
    shrink_above_px: int = Field(1600, ge=64)
    widen_below_px: int = Field(90, ge=0)
    widen_factor: float = Field(1.25, ge=1)
    uncertain_below: float = Field(0.6, ge=0.5, le=1)
    sample_fps: float = Field(1.0, gt=0, le=240, description="frames looked at per second of video")
    sample: SampleMode = Field(SampleMode.FRAMES, description="frames, or keyframes: cheaper, as many as the video has")


class WorkerSettings(BaseModel):
    processes: int = Field(1, ge=1, description="child processes of one worker")
    threads: int | None = Field(None, ge=1, description="threads per model runtime; unset: cores // processes")
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:n")
    runtime: Literal["onnx", "native"] = Field("onnx", description="ONNX Runtime, or torch and TensorFlow themselves")
    # Decoding takes up to 16 bytes per pixel of a picture (WebP), and 37 per pixel of a frame (H.264 that keeps
    # sixteen): with these, and its models, a process stays below 3 GB. 8K video has 33 megapixels.
    max_image_pixels: int = Field(64_000_000, gt=0, description="a larger picture is quarantined undecoded")
    max_frame_pixels: int = Field(36_000_000, gt=0, description="a video of larger frames is quarantined undecoded")
    max_faces: int = Field(10_000, gt=0, description="a picture or frame with more is quarantined: it is no photograph")
    max_frames: int = Field(100_000, gt=0, description="a job of a video that looks at more frames is quarantined")
    max_video_seconds: float = Field(
        7 * 86400.0, gt=0, allow_inf_nan=False, description="a longer video is quarantined"
    )
    chunk_seconds: float = Field(
        60.0, ge=1, allow_inf_nan=False, description="length of a video's jobs; changes no face, but tracks end with it"
    )
    frame_buffer_bytes: int = Field(128 * 2**20, gt=0, description="decoded frames that wait or are being analysed")
    batch_frames: int = Field(16, ge=1, description="video frames of one size that are analysed together at most")
    group_size: int = Field(16, ge=1, le=256, description="image jobs per message")
    record_seconds: float = Field(1.0, ge=0, description="pictures that are analysed are recorded together, this often")
    read_ahead: int = Field(4, ge=0, description="objects fetched ahead of the one being analysed")
    read_ahead_bytes: int = Field(64 * 2**20, ge=0)
    soft_time_limit_seconds: int = Field(
        900, ge=1, description="per message; pictures not begun are released, a chunk is tried once more"
    )
    hard_time_limit_seconds: int = Field(960, ge=1, description="per message; then the child is killed")
    max_tasks_per_child: int = Field(10_000, ge=1, description="messages; then the child is replaced")
    max_memory_per_child_mb: int = Field(1500, ge=100, description="a child that holds more is replaced")


class LedgerSettings(BaseModel):
    lease_seconds: float = Field(60.0, gt=0)
    heartbeat_seconds: float = Field(15.0, gt=0, description="how often a lease is renewed; well under a third of it")
    stall_seconds: float = Field(300.0, gt=0, description="without progress for this long, the lease is not renewed")
    max_attempts: int = Field(10, ge=1, description="tries at a transient error before quarantine")
    max_crashes: int = Field(3, ge=1, description="crashes while the job ran alone before quarantine")
    max_lost_leases: int = Field(10, ge=1, description="expired leases of unknown cause before quarantine")
    retry_base_seconds: float = Field(2.0, gt=0)
    retry_cap_seconds: float = Field(300.0, gt=0)
    pause_after_refusals: int = Field(
        8, ge=1, description="refusals in a row, with nothing answered in between, that pause a source"
    )
    pause_seconds: float = Field(30.0, gt=0, description="until a paused source is first tried again; then doubled")
    pause_cap_seconds: float = Field(600.0, gt=0, description="the longest wait between two trials")
    overdue_seconds: float = Field(30.0, gt=0, description="a queued job older than this, with an empty queue, is lost")
    lost_seconds: float = Field(
        3600.0, gt=0, description="a queued job older than this is lost, whatever waits in its queue"
    )

    @property
    def pause_policy(self) -> PausePolicy:
        return PausePolicy(self.pause_after_refusals, self.pause_seconds, self.pause_cap_seconds)


class DispatchSettings(BaseModel):
    queue_cap: int = Field(64, ge=1, description="messages Redis may hold per lane")
    backfill_share: float = Field(
        0.1, gt=0, lt=1, description="of the messages sent while live footage keeps all workers busy"
    )
    interval_seconds: float = Field(1.0, gt=0)
    reconcile_seconds: float = Field(5.0, gt=0)
    summarize_seconds: float = Field(5.0, gt=0)
    look_lease_seconds: float = Field(
        120.0, gt=0, description="a look at a camera that registers nothing for so long is taken over"
    )
    look_seconds: float = Field(5.0, gt=0, description="how often it is looked whether a camera's slot is due")


class MetricsSettings(BaseModel):
    port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="where a producer, worker or aggregator serves its metrics; unset or 0: nowhere",
    )
    host: str = Field("127.0.0.1", description="the address it listens at; 0.0.0.0: all of the machine's")


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

    operator: str | None = Field(None, description="who gives commands, for the record; unset: user@host")
    state_dir: Path = Field(Path(".maskwatch"), description="where the embedded stack keeps its state")
    models_dir: Annotated[Path, AfterValidator(Path.expanduser)] = Field(
        _MODELS_DIR, description="where pulled and imported model files lie"
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
        """The environment, then the files of MASKWATCH_SECRETS_DIR: one per setting, named like its variable."""
        folder = os.environ.get("MASKWATCH_SECRETS_DIR")
        if not folder:
            return init_settings, env_settings
        secrets = NestedSecretsSettingsSource(file_secret_settings, secrets_dir=folder, secrets_dir_missing="error")
        return init_settings, env_settings, secrets


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The settings of this process. Raises `MaskwatchError` where they can't be read, and pydantic's
    `ValidationError` for one that can't be."""
    try:
        return Settings()
    except (SettingsError, OSError) as error:
        # "from None": the error below it may hold the text that it could not parse.
        raise MaskwatchError(f"the settings can't be read: {error}") from None
