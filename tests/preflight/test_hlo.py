"""Traffic of compiled programs: a small one over 8 devices, counted by hand, and lines as TPUs and GPUs write them."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from detclipv2_jax.losses import matching
from detclipv2_jax.losses.concept_table import UniqueRows
from detclipv2_jax.preflight import hlo
from detclipv2_jax.runs import sharding


def test_collectives_in_and_out_of_loops():
    mesh = sharding.make_mesh(fsdp=8)

    def local(x):  # f32[4, 16] a device, of [32, 16]
        x = jax.lax.scan(
            lambda c, _: (jax.lax.ppermute(c, "fsdp", [(i, (i + 1) % 8) for i in range(8)]), None), x, None, 5
        )[0]
        whole = jax.lax.all_gather(x, "fsdp", tiled=True)  # [32, 16]
        part = jax.lax.psum_scatter(jnp.sin(whole), "fsdp", tiled=True)  # [4, 16] of an operand [32, 16]
        return jax.lax.psum(jnp.sum(part, axis=0), "fsdp") + jax.lax.psum(jnp.bfloat16(1), "fsdp")

    rows = NamedSharding(mesh, P("fsdp"))
    step = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("fsdp"), out_specs=P(), check_vma=False))
    program = step.lower(jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=rows)).compile()
    traffic = hlo.traffic(program.as_text())
    network = dict(traffic.network)
    assert network.pop("collective-permute") == 5 * 4 * 16 * 4
    assert network.pop("all-gather") == 32 * 16 * 4
    # XLA may reduce and then cut
    reduced = network.pop("reduce-scatter", 0) + network.pop("all-reduce", 0)
    assert reduced == pytest.approx(32 * 16 * 4 + 16 * 4, abs=4)
    assert not network
    assert traffic.unknown_loops == 0


def test_a_loop_whose_length_depends_on_data_counts_once():
    def loop(x, n):
        return jax.lax.fori_loop(0, n, lambda i, y: y @ y, x)

    program = jax.jit(loop).lower(jnp.zeros((64, 64)), 3).compile()
    traffic = hlo.traffic(program.as_text())
    assert traffic.unknown_loops == 1
    assert 2 * 64 * 64 * 4 <= traffic.memory < 8 * 64 * 64 * 4


PROGRAM = """HloModule m

%cut (p.0: f32[10,128], p.1: s32[]) -> f32[1,128] {
  %p.0 = f32[10,128]{1,0:T(8,128)} parameter(0)
  %p.1 = s32[]{:T(128)} parameter(1)
  ROOT %d = f32[1,128]{1,0:T(8,128)} dynamic-slice(%p.0, %p.1), dynamic_slice_sizes={1,128}
}

%put (q.0: f32[10,128], q.1: f32[1,128], q.2: s32[]) -> f32[10,128] {
  %q.0 = f32[10,128]{1,0:T(8,128)} parameter(0)
  %q.1 = f32[1,128]{1,0:T(8,128)S(1)} parameter(1)
  %q.2 = s32[]{:T(128)} parameter(2)
  %n = f32[1,128]{1,0:T(8,128)} negate(%q.1)
  ROOT %u = f32[10,128]{1,0:T(8,128)} dynamic-update-slice(%q.0, %n, %q.2)
}

%body (b: (s32[], f32[10,128])) -> (s32[], f32[10,128]) {
  %b = (s32[]{:T(128)}, f32[10,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%b), index=0
  %x = f32[10,128]{1,0:T(8,128)} get-tuple-element(%b), index=1
  %row = f32[1,128]{1,0:T(8,128)S(1)} fusion(%x, %i), kind=kLoop, calls=%cut
  %new = f32[10,128]{1,0:T(8,128)} fusion(%x, %row, %i), kind=kLoop, calls=%put
  ROOT %t = (s32[]{:T(128)}, f32[10,128]{1,0:T(8,128)}) tuple(%i, %new)
}

%condition (c: (s32[], f32[10,128])) -> pred[] {
  %limit = s32[1]{0:T(128)} constant({300})
  %pair = s32[2]{0:T(128)} constant({1, 2})
  %ten = s32[]{:T(128)} constant(10)
  %c = (s32[]{:T(128)}, f32[10,128]{1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %ten), direction=LT
}

ENTRY %main (a: f32[10,128]) -> f32[10,128] {
  %a = f32[10,128]{1,0:T(8,128)} parameter(0)
  %z = s32[]{:T(128)} constant(0)
  %s = (s32[]{:T(128)}, f32[10,128]{1,0:T(8,128)}) tuple(%z, %a)
  %w = (s32[]{:T(128)}, f32[10,128]{1,0:T(8,128)}) while(%s), condition=%condition, body=%body
  %r = f32[10,128]{1,0:T(8,128)} get-tuple-element(%w), index=1
  %g = (f32[10,128]{1,0}, f32[20,128]{1,0}) all-gather-start(%r), channel_id=1, dimensions={0}
  %h = f32[20,128]{1,0} all-gather-done(%g)
  ROOT %o = f32[10,128]{1,0:T(8,128)} negate(%r)
}
"""


def test_a_loop_over_rows_moves_each_row_once():
    traffic = hlo.traffic(PROGRAM)
    row, index = 128 * 4, 4
    # read into vector memory, which costs nothing more there, and written back; then the last line
    assert traffic.memory == 10 * ((row + index) + (row + index)) + 2 * 10 * row
    assert traffic.network == {"all-gather": 20 * 128 * 4}
    assert traffic.unknown_loops == 0
    assert {row.instruction: row.times for row in traffic.rows} == {"row": 10, "new": 10, "o": 1}
    called = hlo.traffic(PROGRAM.replace("ENTRY %main", "%main") + CALL)
    assert called == traffic  # also how often each row is moved
    backward = hlo.traffic(PROGRAM.replace("direction=LT", "direction=GT"))
    assert (backward.unknown_loops, backward.memory) == (1, 2 * (row + index) + 2 * 10 * row)
    again = hlo.traffic(PROGRAM.replace("ENTRY %main", "%main").replace("direction=LT", "direction=GT") + CALL)
    assert again == backward


CALL = """
ENTRY %entry (e: f32[10,128]) -> f32[10,128] {
  %e = f32[10,128]{1,0:T(8,128)} parameter(0)
  ROOT %k = f32[10,128]{1,0:T(8,128)} call(%e), to_apply=%main
}
"""


BRANCHES = """HloModule m

%send (p: f32[10]) -> f32[10] {
  %p = f32[10]{0} parameter(0)
  %g = f32[80]{0} all-gather(%p), channel_id=1, dimensions={0}
  ROOT %s = f32[10]{0} slice(%g), slice={[0:10]}
}

%stay (q: f32[10]) -> f32[10] {
  %q = f32[10]{0} parameter(0)
  %n = f32[10]{0} negate(%q)
  %e = f32[10]{0} exponential(%n)
  ROOT %m = f32[10]{0} negate(%e)
}

ENTRY %main (a: f32[10], b: pred[]) -> f32[10] {
  %a = f32[10]{0} parameter(0)
  %b = pred[] parameter(1)
  ROOT %c = f32[10]{0} conditional(%b, %a, %a), true_computation=%send, false_computation=%stay
}
"""


def test_what_one_branch_sends_counts_though_the_other_moves_more_memory():
    traffic = hlo.traffic(BRANCHES)
    assert traffic.memory == 3 * 2 * 10 * 4
    assert traffic.network == {"all-gather": 80 * 4}


def test_a_branch_that_few_batches_take_does_not_count():
    """Forward, and on the way back."""

    def named(*operations, place):
        text = BRANCHES
        for operation in operations:
            text = text.replace(f"{operation}\n", f'{operation}, metadata={{op_name="{place}"}}\n')
        return text

    def traffic(place):
        return hlo.traffic(named("negate(%q)", "exponential(%n)", place=place))

    for place in ("jit(step)/jvp(rarely)/neg", "jit(step)/transpose(jvp(DetCLIP))/cond/branch_1_fun/rarely/neg"):
        assert [row.instruction for row in traffic(place).rows] == ["s"]
        assert traffic(place).network == {"all-gather": 80 * 4}
        sent = hlo.traffic(named("slice={[0:10]}", place=place))
        assert sent.network == {}
        assert [row.instruction for row in sent.rows] == ["n", "e", "m"]
        # what both branches have in common is named after one of them
        common = named("negate(%q)", place=place).replace("(%n)\n", '(%n), metadata={op_name="jit(step)/exp"}\n')
        assert [row.instruction for row in hlo.traffic(common).rows] == ["n", "e", "m"]
        assert hlo.module_of(place)[0] in ("other", "DetCLIP")
    assert [row.instruction for row in traffic("jit(step)/rarely_seen/neg").rows] == ["n", "e", "m"]
    both = hlo.traffic(named("slice={[0:10]}", "negate(%q)", "exponential(%n)", place="rarely/neg"))
    assert [row.instruction for row in both.rows] == ["n", "e", "m"]  # one of them runs


NESTED = """HloModule m

%slice (p: bf16[96,8,16], i: s32[]) -> bf16[1,8,16] {
  %p = bf16[96,8,16]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %d = bf16[1,8,16]{2,1,0} dynamic-slice(%p, %i), dynamic_slice_sizes={1,8,16}
}

%all (q: bf16[4,16]) -> bf16[4,16] {
  %q = bf16[4,16]{1,0} parameter(0)
  ROOT %n = bf16[4,16]{1,0} negate(%q)
}

%product (a: bf16[4,16], b: bf16[96,8,16], j: s32[]) -> f32[8,4] {
  %b = bf16[96,8,16]{2,1,0} parameter(1)
  %j = s32[] parameter(2)
  %f = bf16[1,8,16]{2,1,0} fusion(%b, %j), kind=kLoop, calls=%slice
  %v = bf16[8,16]{1,0} bitcast(%f)
  %a = bf16[4,16]{1,0} parameter(0)
  %g = bf16[4,16]{1,0} fusion(%a), kind=kLoop, calls=%all
  ROOT %c = f32[8,4]{1,0} convolution(%v, %g), dim_labels=bf_oi->bf
}

ENTRY %main (a: bf16[4,16], b: bf16[96,8,16], i: s32[]) -> f32[8,4] {
  %a = bf16[4,16]{1,0} parameter(0)
  %b = bf16[96,8,16]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %r = f32[8,4]{1,0} fusion(%a, %b, %i), kind=kOutput, calls=%product
}
"""


def test_of_an_array_that_a_fusion_within_a_fusion_slices_the_slice_counts():
    """As TPU programs take one image of a batch for a product."""
    assert hlo.traffic(NESTED).memory == 2 * (4 * 16 + 8 * 16) + 4 + 4 * 8 * 4
    whole = NESTED.replace("ROOT %c = f32[8,4]{1,0} convolution(%v, %g)", "ROOT %c = f32[8,4]{1,0} convolution(%b, %g)")
    assert hlo.traffic(whole).memory == 2 * (4 * 16 + 96 * 8 * 16) + 4 + 4 * 8 * 4


ROW = """HloModule m

ENTRY %main (a: f32[10,128], u: f32[1,128], i: s32[], m: pred[10]) -> f32[10,128] {
  %a = f32[10,128]{1,0} parameter(0)
  %u = f32[1,128]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %m = pred[10]{0} parameter(3)
  %n = pred[10]{0} not(%m)
  %q = s32[1000]{0} iota(), iota_dimension=0
  %h = s4[6]{0} negate(%q)
  ROOT %r = f32[10,128]{1,0} dynamic-update-slice(%a, %u, %i)
}
"""


def test_a_row_that_is_replaced_moves_a_row_and_a_truth_value_a_byte():
    # and a number of four bits half a one; numbers in a row are not stored before they are read
    assert hlo.traffic(ROW).memory == 2 * 128 * 4 + 2 * 10 + 6 / 2 + 1000 * 4


STACK = """HloModule m

%fused (p.0: s32[]) -> (f32[12,8,4], f32[8]) {
  %p.1 = f32[12,4,8]{1,2,0} parameter(1)
  %b = f32[12,8,4]{2,1,0} bitcast(%p.1)
  %p.0 = s32[] parameter(0)
  %p.2 = f32[8]{0} parameter(2)
  %p.3 = f32[8]{0} parameter(3)
  %p.4 = f32[8]{0} parameter(4)
  %p.5 = f32[12,8,4]{2,1,0} parameter(5)
  %z = s32[] constant(0)
  %row = f32[1,8,4]{2,1,0} dynamic-slice(%p.5, %p.0, %z, %z), dynamic_slice_sizes={1,8,4}
  %u = f32[12,8,4]{2,1,0} dynamic-update-slice(%b, %row, %p.0, %z, %z)
  %sum = f32[8]{0} add(%p.2, %p.3)
  ROOT %t = (f32[12,8,4]{2,1,0}, f32[8]{0}) tuple(%u, %sum)
}

ENTRY %main (i: s32[], a: f32[12,4,8], x: f32[8], y: f32[8], w: f32[8], s: f32[12,8,4]) -> (f32[12,8,4], f32[8]) {
  %i = s32[] parameter(0)
  %a = f32[12,4,8]{1,2,0} parameter(1)
  %x = f32[8]{0} parameter(2)
  %y = f32[8]{0} parameter(3)
  %w = f32[8]{0} parameter(4)
  %s = f32[12,8,4]{2,1,0} parameter(5)
  ROOT %f = (f32[12,8,4]{2,1,0}, f32[8]{0}) fusion(%i, %a, %x, %y, %w, /*index=5*/%s), kind=kLoop, calls=%fused
}
"""


def test_of_a_stack_only_the_row_moves_whatever_its_shape_and_place_among_the_operands():
    row = 8 * 4 * 4
    assert hlo.traffic(STACK).memory == 2 * row + 4 + 4 * 8 * 4  # read and written; the index; three vectors and a sum


SLICES = """HloModule m

ENTRY %main (a: bf16[12,64,128]) -> bf16[1,64,128] {
  %a = bf16[12,64,128]{2,1,0} parameter(0)
  %s = ((bf16[12,64,128]{2,1,0}), bf16[1,64,128]{2,1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[3:4]}
  %d = bf16[1,64,128]{2,1,0:T(8,128)(2,1)S(1)} slice-done(%s)
  %t = ((bf16[12,64,128]{2,1,0}), bf16[1,64,128]{2,1,0}, s32[]{:S(2)}) slice-start(%a), slice={[4:5]}
  %e = bf16[1,64,128]{2,1,0} slice-done(%t)
  ROOT %r = bf16[1,64,128]{2,1,0} add(%d, %e)
}
"""


AHEAD = """HloModule m

%pick (p.0: f32[10,128], p.1: s32[2,1]) -> f32[2,128] {
  %p.0 = f32[10,128]{1,0} parameter(0)
  %p.1 = s32[2,1]{1,0} parameter(1)
  ROOT %g = f32[2,128]{1,0} gather(%p.0, %p.1), offset_dims={1}
}

ENTRY %main (a: f32[10,128], i: s32[2,1]) -> f32[2,128] {
  %a = f32[10,128]{1,0} parameter(0)
  %i = s32[2,1]{1,0} parameter(1)
  %c = (f32[10,128]{1,0}, f32[10,128]{1,0}, u32[]{:S(2)}) copy-start(%a)
  %d = f32[10,128]{1,0} copy-done(%c)
  %s = ((f32[10,128], s32[2,1]), f32[2,128], u32[]{:S(2)}) async-start(%a, %i), calls=%pick
  %t = f32[2,128]{1,0} async-done(%s)
  ROOT %r = f32[2,128]{1,0} fusion(%d, %i), kind=kLoop, calls=%pick
}
"""


def test_what_is_copied_is_read_and_written_once_and_of_what_is_gathered_only_the_rows_count():
    rows = {row.instruction: row.memory for row in hlo.traffic(AHEAD).rows}
    whole, picked, indices = 10 * 128 * 4, 2 * 128 * 4, 2 * 4
    assert rows == {"c": 2 * whole, "g": 2 * picked, "r": 2 * picked + indices}


def test_a_slice_that_is_fetched_ahead_moves_itself_and_not_the_whole():
    row = 64 * 128 * 2
    # into fast memory once, from there it is read for nothing; in main memory it is written, and read to be added
    assert hlo.traffic(SLICES).memory == row + 2 * row + 2 * row


@pytest.mark.parametrize(
    ("place", "module"),
    [
        ("jit(step)/jvp(DetCLIP.encode_image)/swin/stage1/SwinBlock/mlp/dot_general", ("swin/stage1/mlp", "forward")),
        (
            "jit(step)/while/body/closed_call/transpose(jvp(DetCLIP.encode_image))/swin/stage3/"
            "jvp(DetCLIP.encode_image)/swin/stage3/checkpoint/rematted_computation/SwinBlock/attention/qkv/add",
            ("swin/stage3/attention", "recomputed"),
        ),
        ("jit(step)/transpose(jvp(DetCLIP.encode_text))/text_encoder/while/body/n/mul", ("text_encoder/n", "backward")),
        ("jit(step)/optimizer/jit(_where)/select_n", ("optimizer", "forward")),
        ("jit(step)/transpose(jvp(alignment_loss))/bad,cd->bac/dot_general", ("alignment_loss", "backward")),
        ("jit(step)/transpose(jvp())/shard_map/bkd,cd->bkc/dot_general", ("other", "backward")),
        ("jit(step)/vmap(targets)/jvp(a)/b/c/d/e", ("a/b/c", "forward")),
        ("jit(step)/add", ("other", "forward")),
        ("", ("other", "forward")),
    ],
)  # fmt: skip
def test_the_module_of_an_operation(place, module):
    assert hlo.module_of(place) == module


def test_traffic_by_module_adds_up_to_all_of_it():
    def loss(w, x):
        with jax.named_scope("first"):
            x = jnp.tanh(x @ w)
        with jax.named_scope("second"):
            return jnp.sum(jax.lax.fori_loop(0, 3, lambda _, y: jnp.sin(y @ w), x))

    x = jnp.ones((256, 256))
    traffic = hlo.traffic(jax.jit(jax.value_and_grad(loss)).lower(x, x).compile().as_text())
    modules = hlo.by_module((row.place, row.memory) for row in traffic.rows)
    assert sum(modules.values()) == pytest.approx(traffic.memory)
    assert {("first", "forward"), ("second", "forward"), ("second", "backward")} <= modules.keys()
    assert list(modules.values()) == sorted(modules.values(), reverse=True)


def test_loops_over_concepts_turn_once_a_chunk():
    # two images, four regions: 6 concepts a chunk forward, 12 backward
    settings = matching.Settings(axes=(), matching="max", temperature=1.0, chunk_bytes=8 * 2 * 4 * 6)
    regions, text, mask = jnp.ones((2, 4, 8), jnp.bfloat16), jnp.ones((16, 8)), jnp.ones((2, 4), bool)
    slots, weights = jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3))

    def step(num_concepts):
        unique = UniqueRows(jnp.arange(16), jnp.arange(16), num_concepts)

        def loss(regions, text):
            return matching.caption_scores(settings, regions, text, mask, unique, slots, weights)[0].sum()

        return jax.grad(loss, argnums=(0, 1))(regions, text)

    by_data = jax.jit(step).lower(jax.ShapeDtypeStruct((), jnp.int32)).compile().as_text()
    assert hlo.traffic(by_data).unknown_loops == 2
    # of the 16 rows of the table there cannot be more
    for num_concepts, forward, backward in ((14, 3, 2), (12, 2, 1), (100, 3, 2)):
        counted = hlo.traffic(by_data, num_concepts=num_concepts)
        known = (
            jax.jit(functools.partial(step, jnp.int32(min(num_concepts, 16)))).lower().compile()
        )  # XLA counts by itself
        by_xla = hlo.traffic(known.as_text())
        assert counted.unknown_loops == by_xla.unknown_loops == 0
        assert counted.memory == pytest.approx(by_xla.memory, rel=0.02)
        for traffic in (counted, by_xla):
            times = {row.times for row in traffic.rows}
            assert {forward, backward} <= times
            # additions to rows, a loop of 24 turns or none by the compiler, are within the backward one
            assert all(num % backward == 0 for num in times if num > forward)
    assert hlo.module_of("jit(f)/jvp(loss)/chunks_of_6_of_9_concepts/while/body/add") == ("loss", "forward")


def test_a_kernel_reads_an_array_once_however_often_it_is_given():
    """Each of its arguments is a part of the array."""
    text = """HloModule f

ENTRY %main (a: bf16[8,384]) -> bf16[8,128] {
  %a = bf16[8,384]{1,0} parameter(0)
  ROOT %kernel = bf16[8,128]{1,0} custom-call(%a, %a, %a), custom_call_target="tpu_custom_call"
}
"""
    assert hlo.traffic(text).memory == 2 * 8 * (384 + 128)
