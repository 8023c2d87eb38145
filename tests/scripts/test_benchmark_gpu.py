"""The benchmark of GPUs, as far as it goes on a CPU: in its dry run, whose figures mean nothing."""

import json

import benchmark
import benchmark_gpu
import pytest
import torch


@pytest.fixture
def recipe(tmp_path) -> list[str]:
    keys = "dataset_name: x\ntokenizer_name: y\neffective_batch_size: 4\nlearning_rate: 1e-3\nwarmup_steps: 1\n"
    (tmp_path / "recipe.yaml").write_text(keys + "max_steps: 2\n")
    return ["gpu", "--recipe", str(tmp_path / "recipe.yaml"), "--rounds", "2"]


def test_a_dry_run_says_that_it_is_one_and_shows_where_the_time_goes(recipe, tmp_path, capsys):
    benchmark.main([*recipe, "--json", str(tmp_path / "found.json")])
    output, found = capsys.readouterr().out, json.loads((tmp_path / "found.json").read_text())
    assert output.startswith("DRY RUN") and found["dry_run"] is True
    measured = [(case["path"], case["micro_batch"]) for case in found["measured"]]
    assert measured == [(path, size) for size in (1, 2) for path in benchmark_gpu.PATHS]
    for case in found["measured"]:
        assert len(case["seconds"]) == 2 and case["error"] is None
        assert list(case["classes"]) == [*benchmark_gpu.SHOWN, "step"]
        assert case["classes"]["products"] > 0 and case["classes"]["attention"] > 0
        assert output.count(f"| {case['path']} ") == 2
    assert found["tokens"] == 4 * 64


def test_a_micro_batch_that_does_not_fit_is_a_row_and_not_the_end(recipe, monkeypatch, capsys):
    real, calls = benchmark_gpu.seconds, []

    def full(work, device):
        calls.append(work)
        if len(calls) == 3:  # the second round of the first path
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB.")
        return real(work, device)

    monkeypatch.setattr(benchmark_gpu, "seconds", full)
    benchmark.main([*recipe, "--micro_batches", "1", "--paths", "ours", "transformers"])
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line[3].strip() for line in lines if "ours" in line[1]] == ["out of memory"]
    [other] = [line for line in lines if line[1].strip() == "transformers"]
    assert "[" in other[3]


# As they are called in traces of PyTorch on A100, H100 and T4, and on this CPU.
KERNELS = {
    "products": [
        "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_nn",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel",
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_32x32_64x2_tn_align8>",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>",
        "turing_fp16_s1688gemm_fp16_128x128_ldg8_f2f_tn",
        "triton_tem_fused_mm_0",
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
    ],
    "attention": [
        "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128, 128, 4>>",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<64, 128, 128>",
        "fmha_cutlassF_f16_aligned_64x64_rf_sm75(PyTorchMemEffAttention::AttentionKernel)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3i_64x64x128",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    ],
    "loss": [
        # as Inductor names this project's loss and a compiled cross_entropy
        "triton_red_fused_add_copy__div_exp_gather_log1p_mul_neg_reciprocal_rsub_slice_sub_sum_unsqueeze_2",
        "triton_red_fused__to_copy_add_arange_bitwise_and_bitwise_or_div_eq_exp_gather_gt_log1p_lt_max_mul_neg_where_0",
        "triton_red_fused__to_copy_prepare_softmax_online_0",
        "triton_red_fused__log_softmax__to_copy_nll_loss_forward_1",
        "void (anonymous namespace)::cunn_SoftMaxForward<4, float, float, float>",
        "void at::native::(anonymous namespace)::nll_loss_forward_reduce_cuda_kernel_2d<float, float, long>",
        "aten::exp",
        "aten::log1p",
    ],
    "rest": [
        "triton_per_fused__to_copy_add_gelu_native_layer_norm_0",
        "triton_poi_fused_addmm_gelu_2",
        "triton_poi_fused__scaled_dot_product_flash_attention_backward_cat_5",
        "void at::native::multi_tensor_apply_kernel<at::native::FusedAdamMathFunctor<float, 4>>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>",
        "Memcpy HtoD (Pinned -> Device)",
        "aten::add_",
        "aten::native_layer_norm",
    ],
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in KERNELS.items() for name in names])
def test_a_kernel_is_told_by_its_name(kind, name):
    assert benchmark_gpu.class_of(name) == kind
