"""The mutants of csrc/cuda that the tests must notice: at least three of each kind for each kernel.

Those of a .cuh file count for every kernel that includes it, whose tests must all notice them.
"""

from __future__ import annotations

from typing import NamedTuple

NIBBLE, FRAGMENT, SCALE, BOUND, TAIL = KINDS = (
    "nibble shift",
    "fragment index",
    "scale index",
    "bound",
    "grid or tail",
)
NOT_APPLICABLE = {
    ("adamw", NIBBLE): "its codes have 8 bits",
    ("adamw", FRAGMENT): "no mma",
    ("quantize_4bit", FRAGMENT): "no mma",
    ("quantize_absmax", NIBBLE): "its codes have 8 bits",
    ("quantize_absmax", FRAGMENT): "no mma",
    ("dequantize_4bit", FRAGMENT): "no mma",
    ("dropout_mask", NIBBLE): "no codes",
    ("dropout_mask", FRAGMENT): "no mma",
    ("dropout_mask", SCALE): "no scales",
}


class Mutant(NamedTuple):
    """A change of one file of csrc/cuda.

    The pattern occurs in it once, or is the one at `place`. equivalent: why no test can notice the change.
    """

    file: str
    kind: str
    pattern: str
    replacement: str
    equivalent: str = ""
    place: int | None = None


ADAMW = "adamw.cu"
QUANTIZE_4BIT = "quantize_4bit.cu"
QUANTIZE_ABSMAX = "quantize_absmax.cu"
DEQUANTIZE_4BIT = "dequantize_4bit.cu"
DROPOUT_MASK = "dropout_mask.cu"
LINEAR_4BIT = "linear_4bit.cu"
DGRAD = "linear_4bit_dgrad.cu"
ABSMAX, PAIR_TABLE, SPLIT = "absmax.cuh", "pair_table.cuh", "split.cuh"

MUTANTS = [
    Mutant(QUANTIZE_4BIT, NIBBLE, "<< nibble_shift(i)", "<< (4 * i)"),
    Mutant(QUANTIZE_4BIT, NIBBLE, "word >> (4 * i)", "word >> (2 * i)"),
    Mutant(QUANTIZE_4BIT, NIBBLE, "byte & 0xf0u", "byte & 0x0fu"),
    Mutant(QUANTIZE_4BIT, NIBBLE, "code_of_rank[rank]} << (4 * rank)", "code_of_rank[rank]} << (3 * rank)"),
    Mutant(QUANTIZE_4BIT, SCALE, "absmax[first >> blocksize_log2]", "absmax[first >> blocksize_log2 ^ 1]"),
    Mutant(QUANTIZE_4BIT, SCALE, "warp_largest[thread / kWarp] =", "warp_largest[thread / kWarp ^ 1] ="),
    Mutant(QUANTIZE_4BIT, SCALE, "thread / kWarp & ~(warps - 1)", "thread / kWarp & (warps - 1)"),
    Mutant(QUANTIZE_4BIT, SCALE, "lanes < min(threads_per_block, kWarp)", "lanes < kWarp"),
    Mutant(QUANTIZE_4BIT, BOUND, "(step / 4 - 1)", "step / 4"),
    Mutant(QUANTIZE_4BIT, BOUND, "x > *next", "x >= *next"),
    Mutant(QUANTIZE_4BIT, BOUND, "step >= 4;", "step > 4;"),
    Mutant(QUANTIZE_4BIT, BOUND, "i < count ? to_float", "i <= count ? to_float"),
    Mutant(QUANTIZE_4BIT, TAIL, "ceil_div(n, kPerCta)", "n / kPerCta"),
    Mutant(
        QUANTIZE_4BIT, TAIL, "ceil_div(n, kPerCta)", "n / kPerCta + 1",
        equivalent="where n is a multiple, one more CTA, none of whose threads has a weight",
    ),
    Mutant(QUANTIZE_4BIT, TAIL, "if (count == 0) return;", ""),
    Mutant(QUANTIZE_4BIT, TAIL, "i < count; i += 2", "i + 1 < count; i += 2"),
    Mutant(QUANTIZE_4BIT, TAIL, "if (i + 1 == count)", "if (i == count)"),
    Mutant(QUANTIZE_4BIT, TAIL, "(weight) % 16 == 0", "(weight) % 4 == 0"),

    Mutant(QUANTIZE_ABSMAX, SCALE, "(first_group + group) *", "first_group + group *"),
    Mutant(QUANTIZE_ABSMAX, SCALE, "values[thread][i]", "values[0][i]"),
    Mutant(QUANTIZE_ABSMAX, SCALE, "group_sums[first_group + thread] =", "group_sums[thread] ="),
    Mutant(QUANTIZE_ABSMAX, SCALE, "begin + kMeanTile + thread", "begin + thread"),
    Mutant(QUANTIZE_ABSMAX, SCALE, "nested_absmax[group] =", "nested_absmax[group ^ 1] ="),
    Mutant(QUANTIZE_ABSMAX, BOUND, "thread < kNumDynamicCodes - 1)", "thread < kNumDynamicCodes - 2)"),
    Mutant(QUANTIZE_ABSMAX, BOUND, "device_dynamic_codebook.bound[thread]", "device_dynamic_codebook.value[thread]"),
    Mutant(QUANTIZE_ABSMAX, BOUND, "inverse_group_absmax(__uint_as_float(largest))", "1.0f / __uint_as_float(largest)"),
    Mutant(QUANTIZE_ABSMAX, BOUND, "lanes < kWarp;", "lanes < kWarp / 2;"),
    Mutant(QUANTIZE_ABSMAX, BOUND, "group < num_groups ?", "group <= num_groups ?"),
    Mutant(QUANTIZE_ABSMAX, TAIL, "ceil_div(num_groups, groups)", "num_groups / groups"),
    Mutant(QUANTIZE_ABSMAX, TAIL, "[thread] = i < n ?", "[thread] = i <= n ?"),
    Mutant(QUANTIZE_ABSMAX, TAIL, "* kNestedBlocksize >= n) return", "* kNestedBlocksize > n) return"),
    Mutant(QUANTIZE_ABSMAX, TAIL, "begin < num_groups; begin +=", "begin + 1 < num_groups; begin +="),
    Mutant(QUANTIZE_ABSMAX, TAIL, "if (i < n) codes", "if (i <= n) codes"),
    Mutant(QUANTIZE_ABSMAX, TAIL, "n == 0 ? 0.0f : ", ""),

    Mutant(DROPOUT_MASK, BOUND, "< kept_below", "<= kept_below"),
    Mutant(DROPOUT_MASK, BOUND, "first % kRandomBlock", "first"),
    Mutant(DROPOUT_MASK, BOUND, "first / kRandomBlock", "first / kThreads / kPerThread"),
    Mutant(DROPOUT_MASK, BOUND, "n - first >= kPerThread", "n - first > kPerThread"),
    Mutant(DROPOUT_MASK, TAIL, "if (n == 0) return cudaSuccess;", ""),
    Mutant(DROPOUT_MASK, TAIL, "first + i < n", "first + i <= n"),
    Mutant(DROPOUT_MASK, TAIL, "n - first >= kPerThread", "n - first + 1 >= kPerThread"),
    Mutant(DROPOUT_MASK, TAIL, "ceil_div(n, ", "(n / "),

    Mutant(DEQUANTIZE_4BIT, NIBBLE, "nibble_shift(i)", "4 * i"),
    Mutant(DEQUANTIZE_4BIT, NIBBLE, "kGroup == 1 ? 0 :", "kGroup == 1 ? 4 :"),
    Mutant(DEQUANTIZE_4BIT, NIBBLE, "packed + element / 2", "packed + element / 4"),
    Mutant(DEQUANTIZE_4BIT, NIBBLE, "codes[j] >> shift & 0xfu", "codes[j] >> shift & 0x7u"),
    Mutant(DEQUANTIZE_4BIT, SCALE, "(place_in_block + j * step)", "(j * step)"),
    Mutant(DEQUANTIZE_4BIT, SCALE, "place_in_group + next[j]", "next[j]"),
    Mutant(DEQUANTIZE_4BIT, SCALE, "w.nested_absmax + block / kNestedBlocksize", "w.nested_absmax"),
    Mutant(DEQUANTIZE_4BIT, SCALE, "blocksize_log2, region.first + i", "blocksize_log2, i"),
    Mutant(DEQUANTIZE_4BIT, BOUND, "j * kStep < left", "j * kStep <= left"),
    Mutant(DEQUANTIZE_4BIT, BOUND, "thread < kNumCodes)", "thread < kNumCodes - 1)"),
    Mutant(DEQUANTIZE_4BIT, BOUND, "row < region.rows ?", "row <= region.rows ?"),
    Mutant(DEQUANTIZE_4BIT, BOUND, "min(width - column, std::int64_t{kStrip})", "kStrip"),
    Mutant(DEQUANTIZE_4BIT, TAIL, "ceil_div(strips, kPerCta)", "strips / kPerCta"),
    Mutant(DEQUANTIZE_4BIT, TAIL, "thread < tail)", "thread + 1 < tail)"),
    Mutant(DEQUANTIZE_4BIT, TAIL, "ceil_div(region.width - region.width % kGroup, kStrip)", "region.width / kStrip"),
    Mutant(DEQUANTIZE_4BIT, TAIL, "region.width >= kGroup && multiple(region.first)", "region.width >= kGroup"),
    Mutant(DEQUANTIZE_4BIT, TAIL, "(out) % 16 == 0", "(out) % 4 == 0"),
    Mutant(DEQUANTIZE_4BIT, TAIL, "multiple(region.row_stride) && multiple(region.width)", "true"),

    Mutant(ADAMW, SCALE, "absmax + block)", "absmax)"),
    Mutant(ADAMW, SCALE, "lanes < kWarp;", "lanes < kWarp / 2;"),
    Mutant(ADAMW, SCALE, "inverse_group_absmax(__uint_as_float(largest))", "1.0f / __uint_as_float(largest)"),
    Mutant(ADAMW, SCALE, "__fdiv_rn(1.0f, *options.grad_scale)", "*options.grad_scale"),
    Mutant(ADAMW, BOUND, "thread < kNumDynamicCodes - 1)", "thread < kNumDynamicCodes - 2)"),
    Mutant(ADAMW, BOUND, "sq_book.copy(exp_avg_sq_codebook", "sq_book.copy(exp_avg_codebook"),
    Mutant(ADAMW, BOUND, "first_block <= block", "first_block < block"),
    Mutant(ADAMW, BOUND, "end - begin > 1", "end - begin > 2"),
    Mutant(ADAMW, BOUND, "encode_dynamic(book.bound", "encode_dynamic(book.value"),
    Mutant(ADAMW, BOUND, "(entry.slice.first + i) / kAdamwBlock", "i / kAdamwBlock"),
    Mutant(ADAMW, TAIL, "ceil_div(blocks, kPerCta)", "blocks / kPerCta"),
    Mutant(ADAMW, TAIL, "if (blocks == 0)", "if (n == 0)"),
    Mutant(ADAMW, TAIL, "min(slice.count - i[j], std::int64_t{kGroup})", "std::int64_t{kGroup}"),
    Mutant(ADAMW, TAIL, "if (k < count) group.x[k] = from[k]", "if (k + 1 < count) group.x[k] = from[k]"),
    Mutant(ADAMW, TAIL, "if (k < count) to[k]", "if (k <= count) to[k]"),
    Mutant(ADAMW, TAIL, "static_cast<std::uintptr_t>(4 * bytes) == 0", "static_cast<std::uintptr_t>(bytes) == 0"),
    Mutant(ADAMW, TAIL, "if (block_of_all >= blocks) return;", ""),

    Mutant(PAIR_TABLE, NIBBLE, "byte & 0xf) << 16", "byte & 0xf)"),
    Mutant(PAIR_TABLE, NIBBLE, "quant_type, byte >> 4)", "quant_type, byte >> 3 & 0xf)"),
    Mutant(PAIR_TABLE, NIBBLE, "byte & 0xf) <<", "byte & 0x7) <<"),
    Mutant(PAIR_TABLE, FRAGMENT, "0x5504 | kByte << 4", "0x5504 | (kByte ^ 1) << 4"),
    Mutant(PAIR_TABLE, BOUND, "i < 256 * 8;", "i < 255 * 8;"),
    Mutant(ABSMAX, SCALE, "run.words[0] >>= 8", "run.words[0] >>= 4"),
    Mutant(ABSMAX, SCALE, "i < in_group ? group_absmax : last_absmax", "group_absmax"),
    Mutant(ABSMAX, SCALE, "index * (16 / run_length)", "index"),
    Mutant(ABSMAX, SCALE, "8 * (block - word_first)", "4 * (block - word_first)"),
    Mutant(ABSMAX, BOUND, "min(end, first + run_length)", "first + run_length"),
    Mutant(ABSMAX, BOUND, "min(end, word_first + word_length)", "word_first + word_length"),
    Mutant(SPLIT, TAIL, "(tile + 1) * units - 1", "(tile + 1) * units"),
    Mutant(SPLIT, TAIL, "2 * cta + (begin(cta) / units != tile)", "2 * cta"),
    Mutant(SPLIT, TAIL, "? cta + tile", "? cta"),
    Mutant(SPLIT, TAIL, "ctas + std::min(ctas, tiles)", "ctas"),
    Mutant(SPLIT, TAIL, "(cta < longer_runs ? cta : longer_runs)", "longer_runs"),
    Mutant(SPLIT, TAIL, "tiles % ctas != 0", "tiles < ctas"),
    Mutant(SPLIT, TAIL, "arguments.arrivals, 0, meeting", "arguments.arrivals, 1, meeting"),
    Mutant(SPLIT, BOUND, "cta <= split.last_cta(tile)", "cta < split.last_cta(tile)"),

    Mutant(LINEAR_4BIT, NIBBLE, "row_bytes = args.K / 2", "row_bytes = args.K / 4"),
    Mutant(LINEAR_4BIT, FRAGMENT, "member * (C::kSmallBlocks ? 4 : 8)", "member * (C::kSmallBlocks ? 8 : 4)"),
    Mutant(LINEAR_4BIT, FRAGMENT, "(2 * member + i) ^", "(2 * member + 1 - i) ^"),
    Mutant(LINEAR_4BIT, FRAGMENT, "kWhich < 2 ? upper.x : upper.y", "kWhich < 2 ? upper.y : upper.x"),
    Mutant(LINEAR_4BIT, FRAGMENT, "8 * j + e % 2", "8 * j + e / 2"),
    Mutant(LINEAR_4BIT, FRAGMENT, "(8 * j + group) * C::kStepQuanta", "(8 * j + member) * C::kStepQuanta"),
    Mutant(LINEAR_4BIT, SCALE, "fmaf(part[2], scale(2 * i + 1)", "fmaf(part[2], scale(2 * i)"),
    Mutant(LINEAR_4BIT, SCALE, "lane / 2 % 8", "lane / 2 % 4"),
    Mutant(LINEAR_4BIT, SCALE, "(2 * chunk + lane % 2)", "(2 * chunk)"),
    Mutant(LINEAR_4BIT, BOUND, "= row < args.N;", "= row <= args.N;"),
    Mutant(LINEAR_4BIT, BOUND, "x_row + i >= args.M", "x_row + i > args.M"),
    Mutant(LINEAR_4BIT, BOUND, "x_part * 8 < args.K", "x_part * 8 <= args.K"),
    Mutant(LINEAR_4BIT, BOUND, "C::kTileRows + row < args.N", "C::kTileRows + row <= args.N"),
    Mutant(LINEAR_4BIT, BOUND, "n >= args.N", "n > args.N"),
    Mutant(LINEAR_4BIT, BOUND, "n + 2 < args.N", "n + 2 <= args.N"),
    Mutant(LINEAR_4BIT, TAIL, "ceil_div(p.N, C::kTileRows)", "p.N / C::kTileRows"),
    Mutant(LINEAR_4BIT, TAIL, "(args.K + C::kStepK - 1) / C::kStepK", "args.K / C::kStepK"),
    Mutant(LINEAR_4BIT, TAIL, "C::kAhead * kQuantum <= end_k", "C::kAhead * kQuantum <= end_k + kQuantum"),
    Mutant(LINEAR_4BIT, TAIL, "stage_x(step + C::kStages - 1)", "stage_x(step + C::kStages)"),
    Mutant(LINEAR_4BIT, TAIL, "if (step == first_step || (", "if (("),

    Mutant(DGRAD, NIBBLE, "(a, b >> 4)", "(a, b)"),
    Mutant(DGRAD, NIBBLE, "(a << 4, b)", "(a, b)"),
    Mutant(DGRAD, NIBBLE, "args.w.packed + lane_k / 2", "args.w.packed + lane_k / 4"),
    Mutant(DGRAD, FRAGMENT, "(shared, odd01, lane4)", "(shared, even01, lane4)"),
    Mutant(DGRAD, FRAGMENT, "i == 0 ? words.x : words.y", "words.x"),
    Mutant(DGRAD, FRAGMENT, "sum[4 * part + kByte]", "sum[4 * part + (kByte ^ 1)]"),
    Mutant(DGRAD, FRAGMENT, "sum[i][j][2 + e]", "sum[i][j][3 - e]"),
    Mutant(DGRAD, FRAGMENT, "2 * (member % 2) + e", "2 * (member / 2) + e"),
    Mutant(DGRAD, SCALE, "C::kChunkN + n + 4 * member", "C::kChunkN + n + 4 * (member ^ 1)"),
    Mutant(DGRAD, SCALE, "scales[(run + block) * C::kChunkN", "scales[block * C::kChunkN"),
    Mutant(DGRAD, SCALE, "scale_pairs[e / 2]", "scale_pairs[e % 2]"),
    Mutant(DGRAD, SCALE, "first.y * scale.y", "first.y * scale.x"),
    Mutant(DGRAD, BOUND, "n + 4 * member + i < end_n", "n + 4 * member + i <= end_n"),
    Mutant(DGRAD, BOUND, "lane_k < args.K", "lane_k <= args.K"),
    Mutant(DGRAD, BOUND, "n + column < end_n", "n + column <= end_n"),
    Mutant(DGRAD, BOUND, "m < rows_m &&", "m <= rows_m &&"),
    Mutant(DGRAD, BOUND, "k >= args.K", "k > args.K"),
    Mutant(DGRAD, TAIL, "min(C::kTileM, args.M - first_m)", "C::kTileM"),
    Mutant(DGRAD, TAIL, "split, tiles_m<C>(p), meeting", "split, 1, meeting"),
    Mutant(DGRAD, TAIL, "ceil_div(p.N, kStepN)", "p.N / kStepN"),
    Mutant(DGRAD, TAIL, "min(C::kChunkN, end_n - chunk_n)", "(end_n - chunk_n)"),
    Mutant(DGRAD, TAIL, "end_n - chunk_n - C::kAhead * kGroup", "end_n - chunk_n"),
]  # fmt: skip
