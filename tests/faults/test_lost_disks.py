"""Runs that are killed on machines whose disks go with them, and continued in an empty folder from what is kept
elsewhere: on the loopback Hub, in a store of objects on the loopback address."""

import itertools
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import requests
import s3fs
from moto.server import ThreadedMotoServer
from support.bench import STEPS, campaign, last_step
from support.disturbances import impatient, slow_steps, use_hub
from support.faulty_proxy import FaultyProxy, Trouble
from support.hub_server import HubServer

pytestmark = pytest.mark.xdist_group("faults")

TOKEN = "hf_FAKEfakeFAKEfake0123456789abcdefgh"
S3_KEYS = {"AWS_ACCESS_KEY_ID": "AKIAFAKEFAKEFAKE", "AWS_SECRET_ACCESS_KEY": "fakeSECRETfake0123456789abcdefghijkl"}
SECRETS = (TOKEN, S3_KEYS["AWS_SECRET_ACCESS_KEY"])
WITHOUT_KEYS = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true"}
BUCKET = "checkpoints"
STEP_SECONDS = 0.1


@pytest.fixture(scope="module")
def hub_server(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        server.add_token(TOKEN, user="tester")
        yield server


class ObjectStore:
    """A store of objects that speaks S3's protocol, behind a proxy, with one bucket."""

    def __init__(self, proxy: FaultyProxy, port: int):
        self.proxy = proxy
        self.env = S3_KEYS | {"AWS_ENDPOINT_URL": proxy.url, "AWS_DEFAULT_REGION": "us-east-1"}
        self._files = s3fs.S3FileSystem(
            key="x", secret="x", endpoint_url=f"http://127.0.0.1:{port}", use_listings_cache=False
        )
        self._files.mkdir(BUCKET)

    def contents(self) -> list[bytes]:
        names = self._files.find(BUCKET)
        return list(self._files.cat(names).values()) if names else []


@pytest.fixture(scope="module")
def store():
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    # It keeps what it held for as long as this process lives, and a campaign comes here with each optimizer.
    requests.post(f"http://127.0.0.1:{port}/moto-api/reset", timeout=10).raise_for_status()
    with FaultyProxy(port) as proxy:
        yield ObjectStore(proxy, port)
    server.stop()


@dataclass
class Elsewhere:
    """What keeps checkpoints: the options and the environment of a run that uses it, what is done to the process of
    the run and to the server before each start, and the files that the server holds."""

    options: Callable[[str], list[str]]  # of a name of its own
    env: dict[str, str]
    disturbance: Callable
    disturb_server: Callable[[], None]
    contents: Callable[[], Iterable[bytes]]


def kill_and_continue(bench, home, draw, number: int, elsewhere: Elsewhere) -> str:
    """Kill the run at a random instant, of which three of four lie after something was kept; remove its folder, and
    start the same command again, to the end of the undisturbed run; what became of it. No secret is in any file, here
    or elsewhere."""

    def start():
        elsewhere.disturb_server()
        slow = partial(slow_steps, STEP_SECONDS)
        return bench.start(home, elsewhere.disturbance, slow, options=options, env=elsewhere.env)

    for attempt in itertools.count():  # a run that had ended was not killed: another instant
        options = elsewhere.options(f"lost-{number}-{attempt}")
        job = start()
        while number % 4 != 3 and " is kept at " not in job.text and job.poll() is None:
            time.sleep(0.01)
        job.wait(draw.uniform(0.0, STEPS * STEP_SECONDS))
        job.kill()
        reached, said = last_step(job), job.text
        assert_no_secret(home, elsewhere)
        shutil.rmtree(home)
        if job.status == -signal.SIGKILL:
            break
    again = start()
    while again.wait() == 1 and "the same command tries again" in again.text:  # it failed too often in a row
        said += again.text
        again = start()
    assert again.status == 0, again.text
    bench.compare(home, bench.reference)
    assert_no_secret(home, elsewhere)
    kept = [line for line in said.splitlines() if " is kept at " in line]
    fetched = [line for line in again.text.splitlines() if line.startswith("Fetched step")]
    assert fetched or not kept, f"{said}\n{again.text}"
    troubles = sum("trying again" in line or "not kept" in line for line in (said + again.text).splitlines())
    what = fetched[0].split(" from")[0] if fetched else "nothing was kept yet"
    return f"{reached}; {what}; {troubles} lines of trouble"


def assert_no_secret(home: Path, elsewhere: Elsewhere) -> None:
    files = [path.read_bytes() for path in home.rglob("*") if path.is_file()]  # what it printed is in two of them
    assert len(files) >= 2
    for content in (*files, *elsewhere.contents()):
        assert not [secret for secret in SECRETS if secret.encode() in content]


@pytest.mark.parametrize("number", campaign(range(5), short=1))
def test_a_run_whose_disk_is_lost_goes_on_from_the_hub(bench, home, draw, record_fault, hub_server, number):
    """SIGKILL at a random instant and the folder lost, continued from a Hub that fails, stalls and cuts"""

    def disturb_server() -> None:
        hub_server.faults.clear()
        for _ in range(draw.randrange(5, 10)):
            pattern = draw.choice(["*/preupload/*", "*/commit/*", "/storage/*", "*/resolve/*", "*/revision/*", "*"])
            kind = draw.choice(
                [{"status": 503}, {"cut": True}, {"reset": True}, {"stall": 2.0}, {"after": 100, "cut": True}]
            )
            hub_server.fault(pattern, times=draw.randrange(1, 3), **kind)

    elsewhere = Elsewhere(
        lambda name: ["--push_to_hub", "--hub_model_id", f"tester/{name}", "--hub_strategy", "checkpoint"],
        {"HF_TOKEN": TOKEN},
        partial(use_hub, hub_server.url),
        disturb_server,
        lambda: (file.read_bytes() for file in hub_server.storage.iterdir()),
    )
    record_fault(kill_and_continue(bench, home, draw, number, elsewhere))


@pytest.mark.parametrize("number", campaign(range(5), short=1))
def test_a_run_whose_disk_is_lost_goes_on_from_a_store_of_objects(bench, home, draw, record_fault, store, number):
    """SIGKILL at a random instant and the folder lost, continued from S3's protocol over connections that break"""

    def disturb_connections() -> None:
        kinds = [Trouble(cut=0), Trouble(cut=draw.randrange(1, 60_000)), Trouble(delay=0.05), Trouble()]
        store.proxy.trouble([draw.choice(kinds) for _ in range(12)])

    elsewhere = Elsewhere(
        lambda name: ["--checkpoint_mirror", f"s3://{BUCKET}/runs/{name}"],
        store.env,
        impatient,
        disturb_connections,
        store.contents,
    )
    record_fault(kill_and_continue(bench, home, draw, number, elsewhere))


def test_a_bucket_that_is_not_there_or_may_not_be_used_is_found_before_the_plan(bench, home, store):
    for address, env in ((f"s3://no-{BUCKET}/x", {}), (f"s3://{BUCKET}/x", WITHOUT_KEYS)):
        job = bench.start(home, options=["--checkpoint_mirror", address], env=store.env | env)
        assert job.wait() == 2, job.text
        assert job.errors.read_text().startswith(f"error: checkpoint_mirror: {address} "), job.text
        assert job.errors.read_text().count("\n") == 1 and not list(home.rglob("recipe.yaml"))
