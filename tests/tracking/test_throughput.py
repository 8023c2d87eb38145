from types import SimpleNamespace

from clm_owt.planning.devices import Hardware
from clm_owt.tracking.throughput import Throughput


def test_throughput_leaves_out_the_wait_for_data_and_begins_anew_at_each_reading():
    throughput = Throughput(flops_per_token=10.0, peak_flops=1000.0)
    throughput.add(100, step_seconds=1.0, data_seconds=5.0)
    throughput.add(100, step_seconds=3.0, data_seconds=0.0)
    assert throughput.read() == {"tokens_per_second": 50.0, "step_seconds": 2.0, "data_seconds": 5.0, "mfu": 0.5}
    throughput.add(100, step_seconds=1.0, data_seconds=0.0)
    assert throughput.read()["tokens_per_second"] == 100.0


def mfu(device_name: str, processes: int) -> float | None:
    """Of GPT-2 small at 180,000 tokens/s."""
    plan = SimpleNamespace(parameters=124_439_808)
    recipe = SimpleNamespace(n_layer=12, n_embd=768, block_size=1024)
    throughput = Throughput.of(plan, recipe, Hardware("cuda", device_name, processes=processes))
    throughput.add(180_000, step_seconds=1.0, data_seconds=0.0)
    return throughput.read().get("mfu")


def test_mfu_is_the_share_of_the_peak_of_all_devices():
    share = 180_000 * (6 * 124_439_808 + 12 * 12 * 768 * 1024) / 312e12
    assert mfu("NVIDIA A100-SXM4-80GB", processes=1) == round(share, 4)
    assert mfu("NVIDIA A100-SXM4-80GB", processes=4) == round(share / 4, 4)


def test_there_is_no_mfu_of_a_device_whose_peak_is_not_known():
    assert mfu("Abacus 9000", processes=1) is None
