"""Runs that are killed on machines whose disks go with them, and continued in an empty folder from what is kept
elsewhere: on the loopback Hub, in a store of objects on the loopback address."""

import itertools
import shutil
import signal
from functools import partial

import pytest
from moto.server import ThreadedMotoServer
from support.bench import campaign, last_step
from support.disturbances import impatient, use_hub
from support.faulty_proxy import FaultyProxy, Trouble
from support.hub_server import HubServer

pytestmark = pytest.mark.xdist_group("faults")

TOKEN = "hf_FAKEfakeFAKEfake0123456789abcdefgh"
S3_KEYS = {"AWS_ACCESS_KEY_ID": "AKIAFAKEFAKEFAKE", "AWS_SECRET_ACCESS_KEY": "fakeSECRETfake0123456789abcdefghijkl"}
SECRETS = (TOKEN, S3_KEYS["AWS_SECRET_ACCESS_KEY"])
BUCKET = "checkpoints"


@pytest.fixture(scope="module")
def hub_server(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        server.add_token(TOKEN, user="tester")
        yield server


@pytest.fixture(scope="module")
def object_store():
    """The proxy before a store of objects that speaks S3's protocol."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    with FaultyProxy(port) as proxy:
        yield proxy
    server.stop()


def kill_and_continue(bench, home, draw, options, disturbance, env, before_each=lambda: None) -> str:
    """Kill the run at a random instant, remove its folder, and start the same command again, to the end of the
    undisturbed run; what became of it."""
    for attempt in itertools.count():  # a run that had ended was not killed: another instant
        options_now = [option.replace("ATTEMPT", str(attempt)) for option in options]
        before_each()
        job = bench.start(home, disturbance, options=options_now, env=env)
        job.wait_for_cpu(bench.instant(draw))
        job.kill()
        reached, said = last_step(job), job.text
        assert not [secret for secret in SECRETS if find_in_files(home, secret)]
        shutil.rmtree(home)
        if job.status == -signal.SIGKILL:
            break
    before_each()
    again = bench.start(home, disturbance, options=options_now, env=env)
    assert again.wait() == 0, again.text
    bench.compare(home, bench.reference)
    assert not [secret for secret in SECRETS if find_in_files(home, secret)]
    kept = [line for line in said.splitlines() if " is kept at " in line]
    fetched = [line for line in again.text.splitlines() if line.startswith("Fetched step")]
    assert fetched or not kept, f"{said}\n{again.text}"
    troubles = sum("trying again" in line or "not kept" in line for line in (said + again.text).splitlines())
    what = fetched[0].split(" from")[0] if fetched else "nothing was kept yet"
    return f"{reached}; {what}; {troubles} lines of trouble"


def find_in_files(folder, secret: str) -> list:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if secret.encode() in path.read_bytes()]


@pytest.mark.parametrize("number", campaign(range(10), short=1))
def test_a_run_whose_disk_is_lost_goes_on_from_the_hub(bench, home, draw, record_fault, hub_server, number):
    """SIGKILL at a random instant and the folder lost, continued from a Hub that fails, stalls and cuts"""
    repo = f"tester/lost-{number}-ATTEMPT"

    def disturb_server() -> None:
        hub_server.faults.clear()
        for _ in range(draw.randrange(4, 9)):
            pattern = draw.choice(["*/preupload/*", "*/commit/*", "/storage/*", "*/resolve/*", "*/revision/*", "*"])
            kind = draw.choice(
                [{"status": 503}, {"cut": True}, {"reset": True}, {"stall": 2.0}, {"after": 100, "cut": True}]
            )
            hub_server.fault(pattern, times=draw.randrange(1, 3), **kind)

    options = ["--push_to_hub", "--hub_model_id", repo, "--hub_strategy", "checkpoint"]
    what = kill_and_continue(
        bench, home, draw, options, partial(use_hub, hub_server.url), {"HF_TOKEN": TOKEN}, disturb_server
    )
    record_fault(what)


@pytest.mark.parametrize("number", campaign(range(10), short=1))
def test_a_run_whose_disk_is_lost_goes_on_from_a_store_of_objects(
    bench, home, draw, record_fault, object_store, number
):
    """SIGKILL at a random instant and the folder lost, continued from S3's protocol over connections that break"""
    import boto3

    boto3.client(
        "s3", endpoint_url=object_store.url, region_name="us-east-1",
        aws_access_key_id="x", aws_secret_access_key="x",
    ).create_bucket(Bucket=BUCKET)  # fmt: skip

    def disturb_connections() -> None:
        kinds = [Trouble(cut=0), Trouble(cut=draw.randrange(1, 60_000)), Trouble(delay=0.2), Trouble()]
        object_store.trouble([draw.choice(kinds) for _ in range(12)])

    options = ["--checkpoint_mirror", f"s3://{BUCKET}/runs/{number}-ATTEMPT"]
    env = S3_KEYS | {"AWS_ENDPOINT_URL": object_store.url, "AWS_DEFAULT_REGION": "us-east-1"}
    record_fault(kill_and_continue(bench, home, draw, options, impatient, env, disturb_connections))
