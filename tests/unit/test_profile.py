"""What the profile makes of a trace: kinds of kernels, and times in which they overlap."""

import random

import pytest

from tidar.benchmarks.profile import EXPOSED, busy_ms, exposed_ms, kind_of, longest_gaps
from tidar.config import UserError
from tidar.config.options import Profiling
from tidar.training.reporting.profiling import StepTraces

ALL_GATHER = "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
NAMES = {
    ALL_GATHER: "all-gather",
    "ncclSymDevKernel_AllGather_LL(ncclSymDevArgs)": "all-gather",
    "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "reduce-scatter",
    "ncclDevKernel_AllReduce_Sum_f64_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "other collectives",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<2>, "
    "at::native::(anonymous namespace)::UnaryOpFunctor<float, 2>, at::native::Copy<float> >": "cast and copy",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<1>, "
    "at::native::(anonymous namespace)::LpNormFunctor<float, (NormType)1, float> >": "optimizer",
    "void at::native::(anonymous namespace)::chunk_cat_cuda_kernel<float, c10::BFloat16>": "cast and copy",
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy_vectorized<OpaqueType<2u>, unsigned>": "cast and copy",
    "at::native::split_with_sizes_copy_out_contiguous_no_cast_kernel(char**, char**, long*)": "cast and copy",
    "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(Iterator&)>": "cast and copy",
    "kernel_cutlass_flash_attncuteflash_bwd_sm90FlashAttentionBackwardSm90_CopyAtom": "attention backward",
    "kernel_cutlass_kernel_quackgemm_sm90GemmSm90_object_at__CopyAtom": "matmuls",
    "Memcpy DtoD (Device -> Device)": "memory movement",
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float> >": "memory movement",
    "triton_poi_fused__to_copy_add_0": "norm and elementwise",
}  # fmt: skip


def test_names_of_kernels_say_their_kind():
    assert {name: kind_of(name) for name in NAMES} == NAMES


@pytest.mark.parametrize("seed", range(20))
def test_times_are_those_of_a_count_tick_by_tick(seed):
    """Kernels of several streams at whole milliseconds; each millisecond is looked at by itself."""
    rng = random.Random(seed)
    found = []
    for _ in range(rng.randint(1, 15)):
        start = rng.randint(0, 60)
        found.append((rng.choice(list(NAMES)), float(start), float(start + rng.randint(1, 12))))
    running = [{kind_of(name) for name, start, end in found if start <= tick < end} for tick in range(80)]
    assert busy_ms(found) == sum(bool(kinds) for kinds in running)
    for exposed in EXPOSED.values():
        assert exposed_ms(found, exposed) == sum(bool(kinds) and kinds <= exposed for kinds in running)
    first, last = (select(tick for tick in range(80) if running[tick]) for select in (min, max))
    gaps = "".join("x" if kinds else " " for kinds in running[first : last + 1]).split("x")
    assert sorted(gap for gap, *_ in longest_gaps(found, 100)) == sorted(len(gap) for gap in gaps if gap)


def test_a_folder_for_traces_that_cannot_be_made(tmp_path):
    (tmp_path / "traces").touch()
    options = Profiling(enable_profiling=True, save_traces_folder="traces")
    with pytest.raises(UserError, match=r"profiling.save_traces_folder = traces: cannot be written \(File exists\)"):
        StepTraces(options, tmp_path, rank=0, steps_done=0)
