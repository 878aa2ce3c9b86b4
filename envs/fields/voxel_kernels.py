"""Radiance grids on a processor: rays through grids of density and colour, forward and backward, compiled by numba.

A field is a sum of grids of raw values. Grid l has ``sizes[l]``^3 nodes, which lie one after the other in ``density``
[P] and ``colour`` [P, 3]; ``extents[l]`` says what it spans. A point p becomes q = (p - centre) / scale. A grid of
extent 0 spans all space by way of the contraction (for the largest magnitude m of q's entries)::

    u = q             if m <= 1
    u = (2 - 1/m) q/m otherwise, within [-2, 2]^3

which is that of Barron et al., "Mip-NeRF 360", CVPR 2022, eq. 10, with the maximum norm instead of the Euclidean. A
grid of extent e > 0 spans the box m < e and is zero elsewhere. Raw values are interpolated trilinearly, then::

    density = GAIN softplus(raw - SHIFT),  colour = sigmoid(raw)

Along a ray, alpha_i = 1 - exp(-density_i delta_i), T_i = prod_{j<i} (1 - alpha_j), w_i = T_i alpha_i, and the colour
is sum_i w_i c_i + T_end background (Mildenhall et al., "NeRF", ECCV 2020, eq. 3). Samples are placed as there: one in
each interval of ``edges``, which say where the light is, then others by the weights of the former.

The kernels take arrays of one floating type and a tuple of numbers of that type, :func:`constants`, so that single
precision stays single.
"""

from __future__ import annotations

import math

import numba
import numpy as np

GAIN, SHIFT = 200.0, 5.4
"""Density = GAIN softplus(raw - SHIFT), in 1 / m."""
FLOOR = 0.003
"""What each interval has in addition to its weight when samples are placed, so that some look everywhere."""
DARK = 1e-4
"""Where less of the light than this is left, a ray ends."""


def constants(dtype: np.dtype) -> tuple:
    """The numbers that the kernels compute with, in the type of their arrays."""
    return tuple(
        np.dtype(dtype).type(x)
        for x in (0, 1, 2, GAIN, SHIFT, FLOOR, DARK, 1e-10, 0, 1e-3, 100, 0.03, 0.3, 0.01, 1 / 2, 1 / 3)
    )


def _compiled(function):
    try:
        return numba.njit(cache=True, nogil=True, fastmath={"contract", "arcp", "nsz", "reassoc"})(function)
    except RuntimeError:  # no folder that could be written: compile anew in each process
        return numba.njit(nogil=True, fastmath={"contract", "arcp", "nsz", "reassoc"})(function)


@_compiled
def _corners(k, ray, t, centre, scale, levels, extents, sizes, starts, nodes, parts):
    """The cells that hold the point at distance t: for each grid its first node, -1 outside, and 8 weights."""
    zero, one, two = k[0], k[1], k[2]
    qx = (ray[0] + t * ray[3] - centre[0]) / scale
    qy = (ray[1] + t * ray[4] - centre[1]) / scale
    qz = (ray[2] + t * ray[5] - centre[2]) / scale
    m = max(abs(qx), max(abs(qy), abs(qz)))
    for g in range(len(sizes)):
        last, half = levels[0, g], levels[1, g]
        if extents[g] == zero:
            grow = one if m <= one else (two - one / m) / m
            x, y, z = (qx * grow + two) * half, (qy * grow + two) * half, (qz * grow + two) * half
        else:
            if m >= extents[g]:
                nodes[g] = -1
                continue
            e = extents[g]
            x, y, z = (qx + e) * half, (qy + e) * half, (qz + e) * half
        i = min(max(np.floor(x), zero), last - one)
        j = min(max(np.floor(y), zero), last - one)
        h = min(max(np.floor(z), zero), last - one)
        size = sizes[g]
        nodes[g] = starts[g] + (np.int64(i) * size + np.int64(j)) * size + np.int64(h)
        x -= i
        y -= j
        z -= h
        a, b = (one - x) * (one - y), (one - x) * y
        c, d = x * (one - y), x * y
        parts[g, 0] = a * (one - z)
        parts[g, 1] = a * z
        parts[g, 2] = b * (one - z)
        parts[g, 3] = b * z
        parts[g, 4] = c * (one - z)
        parts[g, 5] = c * z
        parts[g, 6] = d * (one - z)
        parts[g, 7] = d * z


@_compiled
def _raw_density(zero, density, sizes, nodes, parts):
    value = zero
    for g in range(len(sizes)):
        n = nodes[g]
        if n >= 0:
            s = sizes[g]
            s2 = s * s
            value += (
                parts[g, 0] * density[n]
                + parts[g, 1] * density[n + 1]
                + parts[g, 2] * density[n + s]
                + parts[g, 3] * density[n + s + 1]
                + parts[g, 4] * density[n + s2]
                + parts[g, 5] * density[n + s2 + 1]
                + parts[g, 6] * density[n + s2 + s]
                + parts[g, 7] * density[n + s2 + s + 1]
            )
    return value


@_compiled
def _softplus(k, x):
    # log(1 + e^x) without overflow; where the exponential is small, its series to the type's precision
    e = math.exp(-abs(x))
    if e < k[13]:
        return max(x, k[0]) + e * (k[1] - e * (k[14] - e * k[15]))
    return max(x, k[0]) + math.log1p(e)


@_compiled
def _random(state):
    """The next state of a generator of 32 bits (Marsaglia's xorshift)."""
    state ^= (state << np.uint64(13)) & np.uint64(0xFFFFFFFF)
    state ^= state >> np.uint64(17)
    state ^= (state << np.uint64(5)) & np.uint64(0xFFFFFFFF)
    return state


@_compiled
def _place(
    k,
    ray,
    density,
    centre,
    scale,
    levels,
    extents,
    sizes,
    starts,
    edges,
    fine,
    merge,
    state,
    nodes,
    parts,
    weight,
    t,
    to,
):
    """Places the samples of a ray; writes distances, in order, into ``t`` and how far each reaches into ``to``.

    ``state`` is that of the random numbers that place a sample within its interval, 0 for the middle; ``weight`` is
    room for a number an interval and one more. Returns how many samples there are.
    """
    zero, one, two = k[0], k[1], k[2]
    intervals = len(edges) - 1
    light = one
    last = intervals
    coarse = t[fine:]  # the coarse samples wait behind the fine ones until they are merged
    for s in range(intervals):
        if state == 0:
            to[s] = one / two
        else:
            state = _random(state)
            to[s] = np.float64(state) * 2.3283064365386963e-10
        step = edges[s + 1] - edges[s]
        coarse[s] = edges[s] + step * to[s]
        _corners(k, ray, coarse[s], centre, scale, levels, extents, sizes, starts, nodes, parts)
        raw = _raw_density(zero, density, sizes, nodes, parts)
        left = light * math.exp(-k[3] * _softplus(k, raw - k[4]) * step)
        weight[s] = light - left + k[5]
        light = left
        if light < k[6]:
            last = s + 1
            break
    total = zero
    for s in range(last):
        total += weight[s]
    at, below = 0, zero
    share = total / fine_as(one, fine)
    reach = zero
    for f in range(fine):
        if state == 0:
            to[f] = one / two
        else:
            state = _random(state)
            to[f] = np.float64(state) * 2.3283064365386963e-10
        want = reach + to[f] * share
        reach += share
        while at < last - 1 and below + weight[at] < want:
            below += weight[at]
            at += 1
        t[f] = edges[at] + min(one, (want - below) / weight[at]) * (edges[at + 1] - edges[at])
    count = fine
    if merge:
        # Insertion of the coarse ones, from the far end: both lists are in order.
        count = fine + last
        for s in range(last):
            weight[s] = coarse[s]
        a, b = fine - 1, last - 1
        for s in range(count - 1, -1, -1):
            if b < 0 or (a >= 0 and t[a] > weight[b]):
                t[s] = t[a]
                a -= 1
            else:
                t[s] = weight[b]
                b -= 1
    for s in range(count - 1):
        to[s] = t[s + 1] - t[s]
    to[count - 1] = edges[last] - t[count - 1]
    return count


@_compiled
def fine_as(one, count):
    """An integer as a number of the type of ``one``."""
    value = one - one
    for _ in range(count):
        value += one
    return value


@_compiled
def _shade(
    k, ray, density, colour, centre, scale, levels, extents, sizes, starts, t, to, count, nodes, parts, raws, seen, out
):
    """The light that comes along a ray: colour without background, and distance, into ``out`` [4].

    Writes the raw density, the weight w and the light left behind each sample into ``raws`` [3, samples], and the
    colours into ``seen`` [samples, 3]. Returns how many samples were taken before the ray went dark, and the light
    that is left.
    """
    zero, one = k[0], k[1]
    light = one
    out[0] = out[1] = out[2] = out[3] = zero
    for s in range(count):
        node, part = nodes[s], parts[s]
        _corners(k, ray, t[s], centre, scale, levels, extents, sizes, starts, node, part)
        raw = _raw_density(zero, density, sizes, node, part)
        r = b = g = zero
        for level in range(len(sizes)):
            n = node[level]
            if n >= 0:
                size = sizes[level]
                for corner in range(8):
                    at = n + (corner & 1) + ((corner >> 1) & 1) * size + (corner >> 2) * size * size
                    w = part[level, corner]
                    r += w * colour[at, 0]
                    g += w * colour[at, 1]
                    b += w * colour[at, 2]
        r = one / (one + math.exp(-r))
        g = one / (one + math.exp(-g))
        b = one / (one + math.exp(-b))
        left = light * math.exp(-k[3] * _softplus(k, raw - k[4]) * to[s])
        w = light - left
        light = left
        raws[0, s], raws[1, s], raws[2, s] = raw, w, left
        seen[s, 0], seen[s, 1], seen[s, 2] = r, g, b
        out[0] += w * r
        out[1] += w * g
        out[2] += w * b
        out[3] += w * t[s]
        if light < k[6]:
            return s + 1, light
    return count, light


@_compiled
def draw(k, rays, density, colour, centre, scale, levels, extents, sizes, starts, edges, fine, merge, background, out):
    """Renders rays.

    Args:
        k: :func:`constants`.
        rays: Origins and directions (their length scales distances), [M, 6].
        density: Raw, [P].
        colour: Raw, [P, 3].
        centre: [3], metres.
        scale: Metres.
        levels: The sizes less one, and cells per unit of the place in the grid, [2, L].
        extents: [L].
        sizes: [L], int64.
        starts: Where each grid begins, [L], int64.
        edges: Ends of the intervals along a ray, [Nc + 1].
        fine: Samples that are placed by the weights of the intervals.
        merge: Whether the samples in the intervals count, too.
        background: [3].
        out: Written: red, green, blue, distance, light left; [M, 5].
    """
    room = len(edges) + fine
    t, to, weight = np.empty(room, rays.dtype), np.empty(room, rays.dtype), np.empty(room, rays.dtype)
    raws, seen = np.empty((3, room), rays.dtype), np.empty((room, 3), rays.dtype)
    nodes, parts = np.empty((room, len(sizes)), np.int64), np.empty((room, len(sizes), 8), rays.dtype)
    for ray in range(len(rays)):
        count = _place(
            k, rays[ray], density, centre, scale, levels, extents, sizes, starts, edges, fine, merge, np.uint64(0),
            nodes[0], parts[0], weight, t, to,
        )  # fmt: skip
        _, light = _shade(
            k, rays[ray], density, colour, centre, scale, levels, extents, sizes, starts, t, to, count, nodes, parts,
            raws, seen, out[ray],
        )  # fmt: skip
        for c in range(3):
            out[ray, c] += light * background[c]
        out[ray, 4] = light


@_compiled
def step(
    k, rays, wanted, chosen, seed, density, colour, centre, scale, levels, extents, sizes, starts, edges, fine, merge,
    background, d_density, d_colour,
):  # fmt: skip
    """Adds the gradient of the mean squared error of some rays.

    Args:
        k: :func:`constants`.
        rays: [M, 6], as in :func:`draw`.
        wanted: Their colours, [M, 3].
        chosen: Numbers of the rays to take, [B].
        seed: Of the places of samples; 0 for the middle of each interval.
        density: Raw, [P]; this and what follows as in :func:`draw`.
        colour: Raw, [P, 3].
        centre: [3].
        scale: Metres.
        levels: [2, L].
        extents: [L].
        sizes: [L].
        starts: [L].
        edges: [Nc + 1].
        fine: Samples placed by weight.
        merge: Whether the others count, too.
        background: [3].
        d_density: The gradient is added to it, [P].
        d_colour: The same, [P, 3].

    Returns:
        The mean squared error over rays and channels.
    """
    zero, one, two = k[0], k[1], k[2]
    room = len(edges) + fine
    t, to, weight = np.empty(room, rays.dtype), np.empty(room, rays.dtype), np.empty(room, rays.dtype)
    raws, seen = np.empty((3, room), rays.dtype), np.empty((room, 3), rays.dtype)
    nodes, parts = np.empty((room, len(sizes)), np.int64), np.empty((room, len(sizes), 8), rays.dtype)
    out = np.empty(4, rays.dtype)
    error = 0.0
    factor = two / (fine_as(one, len(chosen)) * fine_as(one, 3))
    for index in range(len(chosen)):
        ray = chosen[index]
        state = np.uint64(0)
        if seed != 0:
            state = (np.uint64(seed) * np.uint64(2654435761) + np.uint64(index) * np.uint64(40503) + np.uint64(1)) & (
                np.uint64(0xFFFFFFFF)
            )
            state = _random(_random(state | np.uint64(1)))
        count = _place(
            k, rays[ray], density, centre, scale, levels, extents, sizes, starts, edges, fine, merge, state, nodes[0],
            parts[0], weight, t, to,
        )  # fmt: skip
        count, light = _shade(
            k, rays[ray], density, colour, centre, scale, levels, extents, sizes, starts, t, to, count, nodes, parts,
            raws, seen, out,
        )  # fmt: skip
        r = out[0] + light * background[0] - wanted[ray, 0]
        g = out[1] + light * background[1] - wanted[ray, 1]
        b = out[2] + light * background[2] - wanted[ray, 2]
        error += r * r + g * g + b * b
        r *= factor
        g *= factor
        b *= factor
        behind = light * (r * background[0] + g * background[1] + b * background[2])
        for s in range(count - 1, -1, -1):
            cr, cg, cb = seen[s, 0], seen[s, 1], seen[s, 2]
            w = raws[1, s]
            along = r * cr + g * cg + b * cb
            # d density / d raw = GAIN sigmoid(raw - SHIFT)
            slope = to[s] * (raws[2, s] * along - behind) * k[3] / (one + math.exp(k[4] - raws[0, s]))
            behind += w * along
            gr = w * r * cr * (one - cr)
            gg = w * g * cg * (one - cg)
            gb = w * b * cb * (one - cb)
            for level in range(len(sizes)):
                n = nodes[s, level]
                if n >= 0:
                    size = sizes[level]
                    for corner in range(8):
                        at = n + (corner & 1) + ((corner >> 1) & 1) * size + (corner >> 2) * size * size
                        p = parts[s, level, corner]
                        d_density[at] += p * slope
                        d_colour[at, 0] += p * gr
                        d_colour[at, 1] += p * gg
                        d_colour[at, 2] += p * gb
    return error / (3 * len(chosen)) + zero


@_compiled
def smooth(density, d_density, size, start, strength):
    """Adds the gradient of strength sum |difference of neighbours| where a grid's density has a gradient already."""
    for i in range(size):
        for j in range(size):
            row = start + (i * size + j) * size
            for h in range(size):
                n = row + h
                if d_density[n] != 0:
                    v = density[n]
                    s = 0
                    if i > 0:
                        s += (v > density[n - size * size]) - (v < density[n - size * size])
                    if i < size - 1:
                        s += (v > density[n + size * size]) - (v < density[n + size * size])
                    if j > 0:
                        s += (v > density[n - size]) - (v < density[n - size])
                    if j < size - 1:
                        s += (v > density[n + size]) - (v < density[n + size])
                    if h > 0:
                        s += (v > density[n - 1]) - (v < density[n - 1])
                    if h < size - 1:
                        s += (v > density[n + 1]) - (v < density[n + 1])
                    d_density[n] += strength * s


@_compiled
def adam(values, gradient, first, second, rate, b1, b2, scale1, scale2, tiny):
    """A step of Adam where the gradient is not zero, and sets the gradient to zero.

    Nodes that no ray has touched stay as they are, momentum included (Sun et al., "Direct Voxel Grid Optimization",
    CVPR 2022, do the same).

    Args:
        values: [P], overwritten.
        gradient: [P].
        first: Mean of the gradient, [P].
        second: Mean of its square, [P].
        rate: Step size.
        b1: Decay of the first.
        b2: Decay of the second.
        scale1: 1 / (1 - b1^step).
        scale2: 1 / (1 - b2^step).
        tiny: What keeps the denominator from zero.
    """
    for n in range(len(values)):
        g = gradient[n]
        if g != 0:
            first[n] += (g - first[n]) * (b1)
            second[n] += (g * g - second[n]) * (b2)
            values[n] -= rate * first[n] * scale1 / (math.sqrt(second[n] * scale2) + tiny)
            gradient[n] = 0


@_compiled
def mend(k, rays, drawn, poses, residual, distance, masks, camera, tolerance):
    """Adds to drawn rays what the field lacks where captured views show the same surface.

    The end of a ray is looked up in each view: the difference between picture and field there counts if the field's
    own surface lies as far from that camera (within ``tolerance`` of the distance), the more the smaller the angle
    between the two rays and the nearer the view (after Buehler et al., "Unstructured Lumigraph Rendering", SIGGRAPH
    2001, sec. 4). At a pose of the capture the result is the picture.

    Args:
        k: :func:`constants`.
        rays: [M, 6].
        drawn: Of :func:`draw`, [M, 5]; the colours are changed.
        poses: Camera to world, [V, 4, 4].
        residual: Picture less field, [V, h, w, 3].
        distance: Of the field's surface along the rays of the views, [V, h, w].
        masks: Whether a pixel counts, [V, h, w].
        camera: fx, fy, cx, cy of the views, [4].
        tolerance: A share of the distance.
    """
    zero, one = k[0], k[1]
    half = one / k[2]
    height, width = distance.shape[1], distance.shape[2]
    least, hundred, some, further = k[9], k[10], k[11], k[12]
    for m in range(len(rays)):
        met = one - drawn[m, 4]
        if met <= half:
            continue
        away = drawn[m, 3] / met
        px = rays[m, 0] + away * rays[m, 3]
        py = rays[m, 1] + away * rays[m, 4]
        pz = rays[m, 2] + away * rays[m, 5]
        total = r = g = b = zero
        for v in range(len(poses)):
            x, y, z = px - poses[v, 0, 3], py - poses[v, 1, 3], pz - poses[v, 2, 3]
            depth = -(x * poses[v, 0, 2] + y * poses[v, 1, 2] + z * poses[v, 2, 2])
            if depth <= least:
                continue
            column = (
                (x * poses[v, 0, 0] + y * poses[v, 1, 0] + z * poses[v, 2, 0]) / depth * camera[0] + camera[2] - half
            )
            row = camera[3] - half - (x * poses[v, 0, 1] + y * poses[v, 1, 1] + z * poses[v, 2, 1]) / depth * camera[1]
            if not (column >= zero and row >= zero):
                continue
            c, w = int(column), int(row)
            if c >= width - 1 or w >= height - 1:
                continue
            length = math.sqrt(x * x + y * y + z * z)
            cosine = min(one, (x * rays[m, 3] + y * rays[m, 4] + z * rays[m, 5]) / length)
            penalty = math.acos(max(cosine, -one)) + further * max(zero, length / away - one)
            weight = one / (least + hundred * penalty * penalty)
            fc, fr = column - np.floor(column), row - np.floor(row)
            for corner in range(4):
                i, j = w + (corner >> 1), c + (corner & 1)
                if masks[v, i, j]:
                    off = (distance[v, i, j] - length) / (tolerance * length)
                    if off * off < hundred:
                        part = (fr if corner >> 1 else one - fr) * (fc if corner & 1 else one - fc)
                        part *= weight * math.exp(-off * off)
                        total += part
                        r += part * residual[v, i, j, 0]
                        g += part * residual[v, i, j, 1]
                        b += part * residual[v, i, j, 2]
        drawn[m, 0] += r / (total + some)
        drawn[m, 1] += g / (total + some)
        drawn[m, 2] += b / (total + some)
