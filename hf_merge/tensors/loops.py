"""Loops over elements on the CPU, compiled by numba: one pass over memory where array operations take one each.

What they compute does not depend on the machine: sums have a fixed order and nothing is contracted or reordered. Arrays are
contiguous; bfloat16 numbers are their bits, uint16. Every function has a twin of torch operations next to where it is used,
for other devices.
"""

from typing import Any

import numpy as np
import torch
from numba import njit
from numba.core import types
from numba.extending import intrinsic, overload
from torch import Tensor

loop: Any = njit(nogil=True, cache=True, error_model="numpy")

CHUNK = 2048
"""Elements that pass through the fastest cache together."""
LANES = 256
"""Partial sums side by side."""
_GOLDEN, _FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_MAGNITUDE = np.uint32(0x7FFFFFFF)


@intrinsic
def _bits(typing: Any, value: Any) -> Any:
    """The bits of a float32, uint32."""
    return types.uint32(types.float32), _reinterpreted


@intrinsic
def _float(typing: Any, bits: Any) -> Any:
    """The float32 of these bits, uint32."""
    return types.float32(types.uint32), _reinterpreted


def _reinterpreted(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))


def _wide(stored):  # type: ignore[no-untyped-def]
    """A stored number as float32."""
    raise NotImplementedError


@overload(_wide)
def _compiled_wide(stored):  # type: ignore[no-untyped-def]
    if stored == types.uint16:
        return lambda stored: _float(np.uint32(np.uint32(stored) << np.uint32(16)))
    return lambda stored: stored


def _rounded(value, out):  # type: ignore[no-untyped-def]
    """A float32 as the nearest (even) number of `out`."""
    raise NotImplementedError


@overload(_rounded)
def _compiled_rounded(value, out):  # type: ignore[no-untyped-def]
    def to_bfloat16(value, out):  # type: ignore[no-untyped-def]
        bits = _bits(value)
        even = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
        return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + even) >> np.uint32(16))

    return to_bfloat16 if out.dtype == types.uint16 else lambda value, out: value


def _overflows(out):  # type: ignore[no-untyped-def]
    """The bits of the least magnitude that is not finite among the numbers of `out`; those of NaN are larger still."""
    raise NotImplementedError


@overload(_overflows)
def _compiled_overflows(out):  # type: ignore[no-untyped-def]
    least = np.uint32(0x7F7F8000 if out.dtype == types.uint16 else 0x7F800000)
    return lambda out: least


@loop
def widen(stored, base, out):  # type: ignore[no-untyped-def]
    """`stored` in float32, less the float32 `base` if that is not empty; whether some are not finite then."""
    largest = np.uint32(0)
    if base.size:
        for i in range(out.size):
            value = _wide(stored[i]) - base[i]
            magnitude = np.uint32(_bits(value) & _MAGNITUDE)
            largest = magnitude if magnitude > largest else largest
            out[i] = value
    else:
        for i in range(out.size):
            value = _wide(stored[i])
            magnitude = np.uint32(_bits(value) & _MAGNITUDE)
            largest = magnitude if magnitude > largest else largest
            out[i] = value
    return largest >= _overflows(out)


@loop
def narrow(merged, scaling, base, out):  # type: ignore[no-untyped-def]
    """`merged` times `scaling`, plus `base` if that is not empty, in the dtype of `out`; whether some are not finite then."""
    largest = np.uint32(0)
    if base.size:
        for i in range(out.size):
            value = merged[i] * scaling + base[i]
            magnitude = np.uint32(_bits(value) & _MAGNITUDE)
            largest = magnitude if magnitude > largest else largest
            out[i] = _rounded(value, out)
    else:
        for i in range(out.size):
            value = merged[i] * scaling
            magnitude = np.uint32(_bits(value) & _MAGNITUDE)
            largest = magnitude if magnitude > largest else largest
            out[i] = _rounded(value, out)
    return largest >= _overflows(out)


@loop
def mix(sources, weights, scaling, base, out):  # type: ignore[no-untyped-def]
    """Σ_k w_k x_k of the `sources`, a tuple; with a `base` that is not empty base + scaling Σ_k w_k (x_k - base).

    In the dtype of `out`; whether some are not finite then.
    """
    broken, one = False, np.float32(1)
    whole, anchor = np.empty(CHUNK, np.float32), np.empty(CHUNK if base.size else 0, np.float32)
    for start in range(0, out.size, CHUNK):
        stop = min(start + CHUNK, out.size)
        size = stop - start
        total, origin = whole[:size], anchor[:size]
        if base.size:
            stored = base[start:stop]
            for i in range(size):
                origin[i] = _wide(stored[i])
        total[:] = np.float32(-0.0)  # which changes nothing that is added to it, not even the sign of a zero
        for k in range(len(sources)):
            row, weight = sources[k][start:stop], weights[k]
            if base.size:
                for i in range(size):
                    total[i] += (_wide(row[i]) - origin[i]) * weight
            else:
                for i in range(size):
                    total[i] += _wide(row[i]) * weight
        broken |= narrow(total, scaling if base.size else one, origin, out[start:stop])
    return broken


@loop
def weighted_sum(stack, weights, out):  # type: ignore[no-untyped-def]
    """Σ_k w_k x_k of `stack` `(models, n)`, added up in the models' order."""
    for start in range(0, out.size, CHUNK):
        stop = min(start + CHUNK, out.size)
        total = out[start:stop]
        for k in range(stack.shape[0]):
            row, weight = stack[k, start:stop], weights[k]
            if k == 0:
                for i in range(total.size):
                    total[i] = row[i] * weight
            else:
                for i in range(total.size):
                    total[i] += row[i] * weight


@loop
def elect(stack, votes, weights, under, at, splits, normalize, out):  # type: ignore[no-untyped-def]
    """Sign election and disjoint merge of `stack` `(models, n)`: see `hf_merge.tensors.consensus.elected`.

    Magnitudes up to `under` count as 0 before the place `splits`, up to `at` from it on; one number each for every model.
    """
    models = stack.shape[0]
    left, ballot = np.empty((models, CHUNK // 2), np.float32), np.empty(CHUNK // 2)
    sign, divisor = np.empty(CHUNK // 2, np.float32), np.empty(CHUNK // 2, np.float32)
    one, zero, tiny = np.float32(1), np.float32(0), np.float32(np.finfo(np.float32).tiny)
    for start in range(0, out.size, CHUNK // 2):
        stop = min(start + CHUNK // 2, out.size)
        size, total = stop - start, out[start:stop]
        for k in range(models):
            values, row, vote = stack[k, start:stop], left[k], np.float64(votes[k])
            limit = under[k] if splits[k] > start else at[k]
            for i in range(size):
                row[i] = values[i] if abs(values[i]) > limit else zero
            if start < splits[k] < stop:
                for i in range(splits[k] - start, size):
                    row[i] = values[i] if abs(values[i]) > at[k] else zero
            if k == 0:
                for i in range(size):
                    ballot[i] = np.float64(row[i]) * vote
            else:
                for i in range(size):
                    ballot[i] += np.float64(row[i]) * vote
        for i in range(size):
            sign[i] = -one if ballot[i] < 0.0 else one
        for k in range(models):
            row, weight = left[k], weights[k]
            turn, share = -one if votes[k] < zero else one, abs(weight)
            if k == 0:
                for i in range(size):
                    agrees = row[i] * (turn * sign[i]) > zero
                    total[i] = row[i] * weight if agrees else zero
                    divisor[i] = share if agrees else zero
            else:
                for i in range(size):
                    agrees = row[i] * (turn * sign[i]) > zero
                    total[i] += row[i] * weight if agrees else zero
                    divisor[i] += share if agrees else zero
        if normalize:
            for i in range(size):
                total[i] /= max(divisor[i], tiny)


@loop
def fill_draws(key, first, out):  # type: ignore[no-untyped-def]
    """SplitMix64 (Steele et al., 2014) at the places from `first` on of the sequence that starts at `key`."""
    for i in range(out.size):
        z = np.uint64(key + (np.uint64(first) + np.uint64(i) + np.uint64(1)) * _GOLDEN)
        z = np.uint64((z ^ (z >> np.uint64(30))) * _FIRST)
        z = np.uint64((z ^ (z >> np.uint64(27))) * _SECOND)
        out[i] = z ^ (z >> np.uint64(31))


@loop
def drop(row, key, steps, scale, out):  # type: ignore[no-untyped-def]
    """`row` times `scale` where the draw of its element is below `steps`, else 0."""
    zero, words = np.float32(0), np.empty(CHUNK // 4, np.uint64)
    drawn = words.view(np.uint16)
    for start in range(0, row.size, CHUNK):
        stop = min(start + CHUNK, row.size)
        fill_draws(key, start // 4, words)
        values, part = row[start:stop], out[start:stop]
        for i in range(stop - start):
            part[i] = values[i] * scale if drawn[i] < steps else zero


@loop
def drop_sizes(row, key, steps):  # type: ignore[no-untyped-def]
    """Σ |x| of `row`, and of what `drop` leaves of it, in float64."""
    zero, words = np.float32(0), np.empty(CHUNK // 4, np.uint64)
    drawn, sums, total, left = words.view(np.uint16), np.empty((2, LANES), np.float32), 0.0, 0.0
    for start in range(0, row.size, CHUNK):
        values = row[start : min(start + CHUNK, row.size)]
        fill_draws(key, start // 4, words)
        sums[:] = zero
        whole = values.size // LANES * LANES
        for begin in range(0, whole, LANES):
            for j in range(LANES):
                magnitude = abs(values[begin + j])
                sums[0, j] += magnitude
                sums[1, j] += magnitude if drawn[begin + j] < steps else zero
        for i in range(whole, values.size):
            sums[0, 0] += abs(values[i])
            sums[1, 0] += abs(values[i]) if drawn[i] < steps else zero
        for j in range(LANES):
            total += np.float64(sums[0, j])
            left += np.float64(sums[1, j])
    return total, left


@loop
def drop_add(row, key, steps, scale, out):  # type: ignore[no-untyped-def]
    """Adds to `out` what `drop` makes of `row`."""
    zero, words = np.float32(0), np.empty(CHUNK // 4, np.uint64)
    drawn = words.view(np.uint16)
    for start in range(0, row.size, CHUNK):
        stop = min(start + CHUNK, row.size)
        fill_draws(key, start // 4, words)
        values, part = row[start:stop], out[start:stop]
        for i in range(stop - start):
            part[i] += values[i] * scale if drawn[i] < steps else zero


@loop
def sizes(row):  # type: ignore[no-untyped-def]
    """Σ |x| in float64."""
    lanes, total = np.empty(LANES, np.float32), 0.0
    whole = row.size // (16 * LANES) * (16 * LANES)
    for start in range(0, whole, 16 * LANES):
        for j in range(LANES):
            lanes[j] = abs(row[start + j])
        for part in range(start + LANES, start + 16 * LANES, LANES):
            for j in range(LANES):
                lanes[j] += abs(row[part + j])
        for j in range(LANES):
            total += np.float64(lanes[j])
    for i in range(whole, row.size):
        total += np.float64(abs(row[i]))
    return total


@loop
def flagged_sizes(row, flags):  # type: ignore[no-untyped-def]
    """Σ |x| of `row`, and of what stands where `flags` has 1 and not 0, in float64."""
    zero, sums, total, left = np.float32(0), np.empty((2, LANES), np.float32), 0.0, 0.0
    whole = row.size // (16 * LANES) * (16 * LANES)
    for start in range(0, whole, 16 * LANES):
        sums[:] = zero
        for part in range(start, start + 16 * LANES, LANES):
            for j in range(LANES):
                magnitude = abs(row[part + j])
                sums[0, j] += magnitude
                sums[1, j] += magnitude if flags[part + j] else zero
        for j in range(LANES):
            total += np.float64(sums[0, j])
            left += np.float64(sums[1, j])
    for i in range(whole, row.size):
        total += np.float64(abs(row[i]))
        left += np.float64(abs(row[i])) if flags[i] else 0.0
    return total, left


@loop
def energy(row):  # type: ignore[no-untyped-def]
    """Σ x² in float64."""
    lanes, total = np.zeros(LANES), 0.0
    whole = row.size // LANES * LANES
    for start in range(0, whole, LANES):
        for j in range(LANES):
            lanes[j] += np.float64(row[start + j]) * np.float64(row[start + j])
    for j in range(LANES):
        total += lanes[j]
    for i in range(whole, row.size):
        total += np.float64(row[i]) * np.float64(row[i])
    return total


@loop
def pack(flags, mask):  # type: ignore[no-untyped-def]
    """1 and 0 in bits: of each `CHUNK` of `flags` the first eighth is in the lowest bits of its bytes, and so on."""
    mask[:] = 0
    for start in range(0, flags.size, CHUNK):
        part = mask[start // 8 : start // 8 + CHUNK // 8]
        for j in range(8):
            plane = flags[start + j * part.size : start + (j + 1) * part.size]
            for i in range(plane.size):
                part[i] |= np.uint8(plane[i]) << np.uint8(j)


@loop
def only(row, mask, factor, out):  # type: ignore[no-untyped-def]
    """`row` times `factor` where the packed `mask` has 1, else 0."""
    zero = np.float32(0)
    for start in range(0, row.size, CHUNK):
        bits = mask[start // 8 : start // 8 + CHUNK // 8]
        for j in range(8):
            begin, flag = start + j * bits.size, np.uint8(1 << j)
            values, part = row[begin : begin + bits.size], out[begin : begin + bits.size]
            for i in range(values.size):
                part[i] = values[i] * factor if bits[i] & flag else zero


@loop
def between(row, low, high, places, found):  # type: ignore[no-untyped-def]
    """The places and the bits of the magnitudes of `row` whose bits are in [low, high], which is not empty; how many there
    are, and how many are above. `places` and `found` have room for eight more than `row` has.
    """
    inside, above, width = 0, 0, np.uint32(high - low)
    flags, hit = np.zeros(CHUNK, np.uint8), np.empty(CHUNK // 8 + 1, np.int32)
    eights = flags.view(np.uint64)
    for start in range(0, row.size, CHUNK):
        bits = row[start : start + CHUNK].view(np.uint32)
        if bits.size < CHUNK:
            flags[:] = 0
        larger = np.uint32(0)
        for i in range(bits.size):
            larger += np.uint32(np.uint32(bits[i] & _MAGNITUDE) > high)
        above += np.int64(larger)
        for i in range(bits.size):
            flags[i] = np.uint32(np.uint32(bits[i] & _MAGNITUDE) - low) <= width
        many = 0  # few: eight at a time are passed over, and nothing branches on what is found
        for group in range((bits.size + 7) // 8):
            hit[many] = group
            many += np.int64(eights[group] != 0)
        for h in range(many):
            for i in range(8 * hit[h], min(8 * hit[h] + 8, bits.size)):
                places[inside] = start + i
                found[inside] = np.uint32(bits[i] & _MAGNITUDE)
                inside += np.int64(flags[i])
    return inside, above


@loop
def rank(rows, order):  # type: ignore[no-untyped-def]
    """For each of `rows` `(rows, n)` the places of its magnitudes in `order`, the largest first and of equal ones the first.

    A bucket sort by the leading digits of the magnitudes below the row's largest one.
    """
    count, n = rows.shape
    width = 1
    while (1 << width) < n and width < 12:
        width += 1
    last, shift = (1 << width) - 1, np.uint32(27 - width)
    first = np.empty(last + 2, np.int32)
    digits, magnitudes = np.empty(n, np.int32), np.empty(n, np.uint32)
    for line in range(count):
        bits, places = rows[line].view(np.uint32), order[line]
        largest = np.uint32(0)
        for i in range(n):
            magnitudes[i] = bits[i] & _MAGNITUDE
            largest = max(largest, magnitudes[i])
        first[:] = 0
        for i in range(n):
            digit = min(np.int32((largest - magnitudes[i]) >> shift), np.int32(last))
            digits[i] = digit
            first[digit + 1] += 1
        for b in range(last + 1):
            first[b + 1] += first[b]
        for i in range(n):
            digit = digits[i]
            places[first[digit]] = i
            first[digit] += 1
        start = 0
        for b in range(last + 1):
            stop = first[b]
            if stop - start > 64:
                keys = np.empty(stop - start, np.uint64)
                for i in range(start, stop):
                    keys[i - start] = (np.uint64(largest - magnitudes[places[i]]) << np.uint64(32)) | np.uint64(places[i])
                keys.sort()
                for i in range(start, stop):
                    places[i] = np.int32(keys[i - start] & np.uint64(0xFFFFFFFF))
            else:
                for i in range(start + 1, stop):
                    place = places[i]
                    magnitude, j = magnitudes[place], i
                    while j > start and magnitudes[places[j - 1]] < magnitude:
                        places[j] = places[j - 1]
                        j -= 1
                    places[j] = place
            start = stop


@loop
def _larger(bits, place):  # type: ignore[no-untyped-def]
    """How many magnitudes are larger than the one at `place`, equal ones before it among them."""
    magnitude, count = np.uint32(bits[place] & _MAGNITUDE), np.int32(0)
    for i in range(place):
        count += np.int32(np.uint32(bits[i] & _MAGNITUDE) >= magnitude)
    for i in range(place + 1, bits.size):
        count += np.int32(np.uint32(bits[i] & _MAGNITUDE) > magnitude)
    return count


@loop
def stays(rows, enough, low, key, out):  # type: ignore[no-untyped-def]
    """1 where the rank of an element of `rows` `(rows, n)` is below what its draw asks for, else 0; where it is 0, either.

    `enough` holds that rank for draws below `low` (n), for each from `low` on, and for those above (0). Most are told by how
    many magnitudes of the row have larger leading digits.
    """
    count, n = rows.shape
    width = 1
    while (1 << width) < n and width < 12:
        width += 1
    last, shift, end = np.uint32((1 << width) - 1), np.uint32(27 - width), np.int32(enough.size - 1)
    larger, digits, unsure = np.empty(np.int64(last) + 2, np.int32), np.empty(n, np.uint16), np.empty(n, np.int32)
    wanted, order = np.empty(n, np.int32), np.empty((1, n), np.int32)
    words = np.empty(n // 4 + 2, np.uint64)
    drawn, before = words.view(np.uint16), np.int32(low - 1)
    for line in range(count):
        bits, flags = rows[line].view(np.uint32), out[line]
        fill_draws(key, line * n // 4, words)
        skip = line * n % 4
        largest = np.uint32(0)
        for i in range(n):
            magnitude = np.uint32(bits[i] & _MAGNITUDE)
            largest = magnitude if magnitude > largest else largest
        for i in range(n):
            digit = np.uint32(np.uint32(largest - np.uint32(bits[i] & _MAGNITUDE)) >> shift)
            digits[i] = np.uint16(digit if digit < last else last)
        larger[:] = 0
        for i in range(n):
            larger[digits[i] + 1] += 1
        for b in range(larger.size - 1):
            larger[b + 1] += larger[b]
        many = 0
        for i in range(n):
            at = np.int32(np.int32(drawn[skip + i]) - before)
            at = at if at > 0 else np.int32(0)
            asked, digit = enough[at if at < end else end], digits[i]
            stay = larger[digit + 1] <= asked
            flags[i] = stay
            unsure[many], wanted[many] = i, asked
            many += (larger[digit] < asked) & (not stay) & (bits[i] & _MAGNITUDE != 0)
        if many * 16 <= n + 256:
            for u in range(many):
                place = unsure[u]
                flags[place] = _larger(bits, place) < wanted[u]
        else:  # crowded digits
            rank(rows[line : line + 1], order)
            for r in range(n):
                place = order[0, r]
                at = min(max(np.int32(drawn[skip + place]) - before, 0), end)
                flags[place] = r < enough[at]


@loop
def variance(stack, scale, out):  # type: ignore[no-untyped-def]
    """See `hf_merge.methods.sce`: the models' variance but for a factor, and in how many elements it is not 0."""
    total, squares, differing = np.empty(CHUNK), np.empty(CHUNK), 0
    models = stack.shape[0]
    for start in range(0, out.size, CHUNK):
        size = min(CHUNK, out.size - start)
        first, part = stack[0, start : start + size], out[start : start + size]
        for i in range(size):
            total[i] = 0.0
            squares[i] = 0.0
        for k in range(1, models):
            row = stack[k, start : start + size]
            for i in range(size):
                difference = np.float64(row[i]) - np.float64(first[i])
                total[i] += difference
                squares[i] += difference * difference
        for i in range(size):
            part[i] = np.float32(squares[i] * (models * scale) - total[i] * total[i] * scale)
        for i in range(size):
            differing += part[i] != 0
    return differing


def served(values: Tensor) -> Any:
    """A tensor's numbers as these functions take them; None if they are not float32 on the CPU."""
    return values.contiguous().numpy() if values.is_cpu and values.dtype is torch.float32 else None
