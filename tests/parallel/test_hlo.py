"""Collectives, FLOPs and loop trips read from compiled programs."""

import pytest

from llm_jax.parallel import hlo
from tests.parallel import on_mesh

LOOP = """HloModule loop

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0:T(128)} get-tuple-element(%p), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %reduced = f32[8]{0} all-reduce(%x), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, to_apply=%sum
  ROOT %tuple = (s32[], f32[8]) tuple(%next, %reduced)
}

%condition (p.1: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[], f32[8]) parameter(0)
  %limit = s32[] constant(9)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (a: f32[4,8,16], b: f32[16,32]) -> f32[4,8,32] {
  %a = f32[4,8,16]{2,1,0} parameter(0)
  %b = bf16[16,32]{1,0} parameter(1)
  %init = (s32[], f32[8]) tuple()
  %while = (s32[], f32[8]) while(%init), condition=%condition, body=%body
  %gather = (bf16[4,32], /*index=1*/bf16[16,32]) all-gather-start(%part), channel_id=3, replica_groups=[2,4]<=[4,2]T(1,0)
  %part = bf16[4,32] copy(%b)
  %send = (f32[8,4]{1,0}, u32[], token[]) send(%data, %token), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %data = f32[8,4]{1,0} copy(%b)
  %llm_jax_nf4_product.3 = bf16[4,64]{1,0} custom-call(%part, %codes), custom_call_target="tpu_custom_call"
  %again = bf16[16,32] all-gather(%part), channel_id=3, replica_groups=[2,4]<=[4,2]T(1,0)
  ROOT %convolution = f32[4,8,32]{2,1,0} convolution(%a, %b.1), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f, backend_config={"estimated_cycles":"100"}
  %b.1 = f32[3,16,32] parameter(2)
}
"""  # noqa: E501


def test_programs_with_known_collectives_and_products(simulated):
    found = simulated(8)(on_mesh.counts)
    assert found["gather"] == ([("all-gather", "fsdp", 1, 16 * 8 * 4)], 0)
    assert found["reduce"] == ([("all-reduce", "data+tensor", 1, 16 * 8 * 4)], 2 * 16 * 8 * 32 // 4)
    assert found["loop"] == ([], on_mesh.TRIPS * 2 * (16 // 4) * 32 * 32)
    kinds = {(kind, axes): count for kind, axes, count, _ in found["loop of products with sums"][0]}
    assert kinds["all-reduce", "tensor"] in (on_mesh.TRIPS, on_mesh.TRIPS - 1)
    assert found["permute"] == ([("collective-permute", "tensor", 1, 8 * 8 * 4)], 0)


def test_the_notations_of_a_tpu():
    module = hlo.parse(LOOP)
    assert module.trips["body"] == 5  # from 0 in steps of 2 to 9
    rows = hlo.collectives(module, {"data": 2, "fsdp": 4})
    assert hlo.Collectives("all-reduce", "fsdp", 5, 5 * 32) in rows
    # One channel counts once; its groups are 0, 2, 4, 6 and 1, 3, 5, 7.
    assert [r for r in rows if r.kind == "all-gather"] == [hlo.Collectives("all-gather", "other", 1, 16 * 32 * 2)]
    assert hlo.Collectives("all-reduce", "slices", 1, 8 * 4 * 4) in rows
    assert hlo.collectives(module, {"fsdp": 4, "data": 2})[0].axes == "fsdp"
    # A window of 3 over 8 positions has 22 pairs that are not in the padding.
    assert hlo.flops(module) == 2 * 4 * 22 * 16 * 32
    assert hlo.cycles(module) == 100


def test_kernels_for_quantized_products_are_counted_by_their_activations_and_result():
    assert hlo.product_kernel_flops(hlo.parse(LOOP)) == 2 * 4 * 32 * 64


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("nothing")


BLAS = """HloModule gemm

ENTRY %main (a: bf16[4,8], b: bf16[8,16]) -> bf16[4,16] {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = bf16[8,16]{1,0} parameter(1)
  %gemm.1 = (bf16[4,16]{1,0}, s8[32]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[]}}}
  ROOT %c = bf16[4,16]{1,0} get-tuple-element(%gemm.1), index=0
}
"""


def test_products_that_a_gpu_leaves_to_cublas_are_counted():
    assert hlo.flops(hlo.parse(BLAS)) == 2 * 4 * 8 * 16
