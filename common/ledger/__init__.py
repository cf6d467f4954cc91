"""The ledger: one row in `jobs` for each unit of work, the moves between its states, and all SQL for both.

`states` has the table of states and moves, and `transitions` builds the statements that move jobs. Nothing else writes
to `jobs`, except `registration`, which inserts them. The modules above these are divided by what moves a job:
`registration` (producers and probes), `dispatch`, `attempts` (workers), `recovery` (the reconciler), `operators`,
`placements` (corrections); `withdrawal` takes jobs out of the figures, and `figures` only reads. Callers use the names
below.

Every function receives a session and leaves the commit to its caller. All transactions take locks in one order, so that
no two deadlock: media objects before their jobs, jobs before their sources, and rows of one table in the order of their
ids; new objects are inserted after all these locks, in the order of their keys. A transaction that has not locked a
media object may move its job only once: at a second move Postgres checks the row's foreign keys again, and would lock
the media object after the job.
"""

from common.domain import JobRef as JobRef
from common.ledger.attempts import ClaimedJob as ClaimedJob
from common.ledger.attempts import await_restore as await_restore
from common.ledger.attempts import claim as claim
from common.ledger.attempts import give_back as give_back
from common.ledger.attempts import plan_chunks as plan_chunks
from common.ledger.attempts import quarantine as quarantine
from common.ledger.attempts import refuse as refuse
from common.ledger.attempts import release as release
from common.ledger.attempts import renew as renew
from common.ledger.attempts import retry_later as retry_later
from common.ledger.attempts import settled_start as settled_start
from common.ledger.attempts import source_changed as source_changed
from common.ledger.attempts import succeed as succeed
from common.ledger.attempts import succeed_all as succeed_all
from common.ledger.dispatch import Dispatch as Dispatch
from common.ledger.dispatch import DispatchedJob as DispatchedJob
from common.ledger.dispatch import Feed as Feed
from common.ledger.dispatch import SentFeed as SentFeed
from common.ledger.dispatch import feeds_with_work as feeds_with_work
from common.ledger.dispatch import pending_messages as pending_messages
from common.ledger.dispatch import recall as recall
from common.ledger.dispatch import sent_feeds as sent_feeds
from common.ledger.dispatch import take_pending as take_pending
from common.ledger.dispatch import take_trials as take_trials
from common.ledger.dispatch import wake_retries as wake_retries
from common.ledger.figures import Progress as Progress
from common.ledger.figures import Waiting as Waiting
from common.ledger.figures import any_active as any_active
from common.ledger.figures import counts_by_state as counts_by_state
from common.ledger.figures import get_job as get_job
from common.ledger.figures import known_keys as known_keys
from common.ledger.figures import progress as progress
from common.ledger.figures import same_bytes as same_bytes
from common.ledger.figures import summary_lag as summary_lag
from common.ledger.figures import unsummarized as unsummarized
from common.ledger.figures import waiting as waiting
from common.ledger.operators import cancel as cancel
from common.ledger.operators import cancel_backfill as cancel_backfill
from common.ledger.operators import erase as erase
from common.ledger.operators import rerun as rerun
from common.ledger.operators import restore_requested as restore_requested
from common.ledger.operators import retry as retry
from common.ledger.placements import Placement as Placement
from common.ledger.placements import correct as correct
from common.ledger.placements import lock_footage as lock_footage
from common.ledger.recovery import recover_expired as recover_expired
from common.ledger.recovery import recover_queued as recover_queued
from common.ledger.recovery import recover_refused as recover_refused
from common.ledger.recovery import report_crash as report_crash
from common.ledger.registration import DETAIL_LIMIT as DETAIL_LIMIT
from common.ledger.registration import UNPLACED as UNPLACED
from common.ledger.registration import Registered as Registered
from common.ledger.registration import check_places as check_places
from common.ledger.registration import keep_from_registering as keep_from_registering
from common.ledger.registration import purged_detail as purged_detail
from common.ledger.registration import register as register
from common.ledger.transitions import StaleJobError as StaleJobError
