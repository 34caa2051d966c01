// The chain norm, scale and shift, SiLU, dropout in one pass over memory, for channels-last images on a CPU.
//
// Arrays: x, y, dy, dx are [B, P, C] (P pixels) of T, float or bfloat16; pre, weight, bias and their gradients [B, C] and
// mean, rstd [B, G] are float. All arithmetic is in float; each result is rounded once.
//
//     u = x + pre;  hat = (u - mean) rstd;  z = weight hat + bias;  y = keep(silu(z))
//
// Images are shared out to threads; where there are fewer images than threads, the pixels of each image are. A pixel's
// channels are taken a vector at a time. The vectors are written out, since what a compiler makes of plain loops here
// hangs by a thread: one more choice between two numbers, and they were ten times as slow.

#include <omp.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

// --- vectors --------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr long BYTES = 64;
#elif defined(__AVX2__)
constexpr long BYTES = 32;
#else
constexpr long BYTES = 16;
#endif
constexpr long W = BYTES / 4;  // lanes

typedef float Floats __attribute__((vector_size(BYTES)));
typedef uint32_t Words __attribute__((vector_size(BYTES)));
typedef uint16_t Halves __attribute__((vector_size(BYTES / 2)));

struct bf16 {
    uint16_t bits;
};

// How many lanes count: all, or those of the last channels, where their number is no multiple of W.
struct All {
    static constexpr long count = W;
};
struct Some {
    long count;
};

// The channels of a pixel, a vector at a time: body(first channel, All or Some).
template <class Body>
inline void channels(long C, Body body) {
    long c = 0;
    for (; c + W <= C; c += W) body(c, All{});
    if (c < C) body(c, Some{C - c});
}

// How many pixels below each other: what belongs to their channel is fetched once for all of them, and their sums wait for
// each other once in so many pixels.
struct Four {
    static constexpr long count = 4;
};
struct One {
    static constexpr long count = 1;
};

// The pixels [from, to), a vector of channels at a time: body(number of the first entry, first channel, All or Some, Four
// or One).
template <class Body>
inline void entries(long from, long to, long C, Body body) {
    long p = from;
    for (; p + Four::count <= to; p += Four::count)
        channels(C, [=](long c, auto lanes) { body(p * C + c, c, lanes, Four{}); });
    for (; p < to; p++) channels(C, [=](long c, auto lanes) { body(p * C + c, c, lanes, One{}); });
}

template <class Lanes>
inline Floats load(const float *from, Lanes lanes) {
    Floats out = {};
    memcpy(&out, from, lanes.count * sizeof(float));
    return out;
}
template <class Lanes>
inline Floats load(const bf16 *from, Lanes lanes) {
    Halves half = {};
    memcpy(&half, from, lanes.count * sizeof(bf16));
    return (Floats)(__builtin_convertvector(half, Words) << 16);
}
template <class Lanes>
inline void store(float *to, Floats value, Lanes lanes) {
    memcpy(to, &value, lanes.count * sizeof(float));
}
template <class Lanes>
inline void store(bf16 *to, Floats value, Lanes lanes) {
#ifdef __AVX512BF16__
    __m256bh half = _mm512_cvtneps_pbh((__m512)value);
#else
    Words wide = (Words)value;
    Words even = (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16;
    Words nan = Words{} + 0x7FC0;
    Halves half = __builtin_convertvector((wide & 0x7FFFFFFF) > 0x7F800000 ? nan : even, Halves);
#endif
    memcpy(to, &half, lanes.count * sizeof(bf16));
}
template <class Lanes>
inline void add(float *to, Floats value, Lanes lanes) {
    store(to, load(to, lanes) + value, lanes);
}

// z between -limit and limit.
inline Floats limited(Floats z, float limit) {
#ifdef __AVX512DQ__
    return (Floats)_mm512_range_ps((__m512)z, _mm512_set1_ps(limit), 2);  // the smaller in size, with the sign of z
#else
    z = z < limit ? z : Floats{} + limit;
    return z > -limit ? z : Floats{} - limit;
#endif
}

// (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2, as good as T can tell: exp(r) within 1.1e-7, and 5.4e-6 of itself.
template <class T>
inline Floats rest(Floats r) {
    Floats p = r * 8.3123976e-3f + 4.1890979e-2f;
    p = p * r + 1.6667119e-1f;
    return p * r + 4.9999225e-1f;
}
template <>
inline Floats rest<bf16>(Floats r) {
    Floats p = r * 4.1276231e-2f + 1.6753861e-1f;
    return p * r + 5.0005156e-1f;
}

// 1 / (1 + exp(-z)); what is beyond 87 on either side counts as 87.
template <class T>
inline Floats sigmoid(Floats z) {
    Floats x = limited(z, 87.0f);
    Floats shifted = x * -1.44269504f + 12582912.0f;  // 1.5 * 2^23: no fractions, and the whole number n in the last bits
    Floats n = shifted - 12582912.0f;
    Floats r = -x - n * 0.693359375f;  // -z - n ln 2, in two parts of which the first is exact
    r = r + n * 2.12194440e-4f;
    Floats power = (rest<T>(r) * r + 1.0f) * r + 1.0f;
    power = (Floats)((Words)power + ((Words)shifted << 23));  // times 2^n
    return 1.0f / (1.0f + power);
}

#ifdef __AVX512DQ__
// Three instructions do what takes a dozen above, none of them a division, as exactly as is enough here: within 6.4e-5.
template <>
inline Floats sigmoid<bf16>(Floats z) {
    Floats x = limited(z, 87.0f) * -1.44269504f;
    Floats r = (Floats)_mm512_reduce_ps((__m512)x, 0);  // x without its nearest whole number
    Floats p = r * 9.5605102e-03f + 5.5917039e-02f;
    p = p * r + 2.4024981e-01f;
    p = p * r + 6.9312196e-01f;
    p = p * r + 9.9999919e-01f;
    Floats power = (Floats)_mm512_scalef_ps((__m512)p, (__m512)(x - r));  // 2^x
    return (Floats)_mm512_rcp14_ps((__m512)(1.0f + power));
}
#endif

// The slope of SiLU.
template <class T>
inline Floats slope(Floats z) {
    Floats on = sigmoid<T>(z);
    return on * (1.0f + z * (1.0f - on));
}

// A number for each entry of a sample, as `mixed` in chance.py. Entries below the threshold are dropped.
inline Words mixed(Words entry, uint32_t key) {
    Words h = (entry * 0x9E3779B1u) ^ key;
    h = (h ^ (h >> 16)) * 0x7FEB352Du;
    h = (h ^ (h >> 15)) * 0x846CA68Bu;
    return h ^ (h >> 16);
}
const Words LANES = [] {
    Words out = {};
    for (long lane = 0; lane < W; lane++) out[lane] = (uint32_t)lane;
    return out;
}();

// --- the chain ------------------------------------------------------------------------------------------------------

struct Shape {
    long B, P, C, G;
    long row;  // from a sample's weight and bias to the next one's: C, or 0 where all have the same
    float eps;
    int silu;
    uint32_t threshold;  // 0: nothing is dropped
    float grown;         // what the entries that stay are multiplied with
};

// Sums over pixels [from, to) of u - origin and its square, per channel.
template <class T>
void sums(const T *x, const float *origin, float *s1, float *s2, long from, long to, long C) {
    entries(from, to, C, [=](long e, long c, auto lanes, auto below) {
        Floats o = load(origin + c, lanes), sum = {}, squares = {};
#pragma GCC unroll 4
        for (long i = 0; i < below.count; i++) {
            Floats value = load(x + e + i * C, lanes) - o;
            sum += value;
            squares += value * value;
        }
        add(s1 + c, sum, lanes);
        add(s2 + c, squares, lanes);
    });
}

// Mean and 1 / deviation of each group from the sums; then factor and offset of each channel: z = factor x + offset.
void finish(const Shape &s, const float *origin, const float *pre, const float *s1, const float *s2, const float *weight,
            const float *bias, float *mean, float *rstd, float *factor, float *offset) {
    const long width = s.C / s.G;
    const double each = 1.0 / (double)s.P, part = 1.0 / (double)width;
    for (long g = 0, end = width; g < s.G; g++, end += width) {
        double m = 0, squares = 0;
        for (long c = end - width; c < end; c++) m += (double)origin[c] + (pre ? pre[c] : 0.0f) + s1[c] * each;
        m *= part;
        for (long c = end - width; c < end; c++) {
            double own = s1[c] * each, off = (double)origin[c] + (pre ? pre[c] : 0.0f) + own - m;
            squares += s2[c] * each - own * own + off * off;
        }
        double variance = squares * part;
        mean[g] = (float)m;
        rstd[g] = (float)(1.0 / __builtin_sqrt((variance > 0 ? variance : 0) + s.eps));
        for (long c = end - width; c < end; c++) {
            factor[c] = weight[c] * rstd[g];
            offset[c] = bias[c] + (float)(((pre ? pre[c] : 0.0f) - m) * factor[c]);
        }
    }
}

// What dropout makes of the entries from `first` on.
inline Floats kept(const Shape &s, Floats value, uint32_t first, uint32_t key) {
    return mixed(LANES + first, key) < s.threshold ? Floats{} : value * s.grown;
}

template <class T>
void apply(const Shape s, const T *x, T *y, const float *factor, const float *offset, uint32_t key, long from, long to) {
    const long C = s.C;
    entries(from, to, C, [=](long e, long c, auto lanes, auto below) {
        Floats f = load(factor + c, lanes), o = load(offset + c, lanes);
#pragma GCC unroll 4
        for (long i = 0; i < below.count; i++) {
            const long at = e + i * C;
            Floats z = f * load(x + at, lanes) + o;
            if (s.silu) z *= sigmoid<T>(z);
            if (s.threshold) z = kept(s, z, (uint32_t)at, key);
            store(y + at, z, lanes);
        }
    });
}

// A thread for each image; where there are fewer images than threads, all of them for one image after another. Never one
// region in another, not even in one that is switched off: the inner one would make its threads anew every time.
template <class F>
void each(const Shape &s, int threads, F image) {
    if (threads == 1 || s.B < threads) {
        for (long b = 0; b < s.B; b++) image(b, threads);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long b = 0; b < s.B; b++) image(b, 1);
}

// body(totals, from, to) for the pixels of an image: they are shared out to threads, whose totals are added up in order.
template <class F>
void pixels(const Shape &s, int threads, float *totals, long count, F body) {
    if (threads == 1) {
        body(totals, 0, s.P);
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        long n = omp_get_num_threads(), i = omp_get_thread_num();
        float part[count + 1];
        memset(part, 0, sizeof part);
        body(part, s.P * i / n, s.P * (i + 1) / n);
#pragma omp for ordered schedule(static, 1)
        for (long k = 0; k < n; k++) {
#pragma omp ordered
            for (long c = 0; c < count; c++) totals[c] += part[c];
        }
    }
}

// Image b, whose results go to y; `inner` threads share it.
template <class T>
void forward(const Shape &s, long b, const T *image, const float *pre, const float *weight, const float *bias,
             const uint32_t *keys, T *y, float *mean, float *rstd, int inner) {
    const long C = s.C;
    const float *own = pre ? pre + b * C : nullptr;
    float origin[C], factor[C], offset[C], totals[2 * C];
    memset(totals, 0, sizeof totals);
    // Near the mean: squares lose no digits.
    channels(C, [&](long c, auto lanes) { store(origin + c, load(image + c, lanes), lanes); });
    pixels(s, inner, totals, 2 * C,
           [&](float *part, long from, long to) { sums(image, origin, part, part + C, from, to, C); });
    finish(s, origin, own, totals, totals + C, weight + b * s.row, bias + b * s.row, mean + b * s.G, rstd + b * s.G, factor,
           offset);
    pixels(s, inner, nullptr, 0, [&](float *, long from, long to) {
        apply(s, image, y, factor, offset, keys ? keys[b] : 0, from, to);
    });
}

// What is known of a channel when its norm is: z = factor x + offset, hat = one x + less.
void known(const Shape &s, long b, const float *pre, const float *weight, const float *bias, const float *mean,
           const float *rstd, float *factor, float *offset, float *one, float *less) {
    const long width = s.C / s.G;
    for (long g = 0, c = 0; g < s.G; g++)
        for (long end = c + width; c < end; c++) {
            const long i = b * s.row + c;
            float shift = (pre ? pre[b * s.C + c] : 0.0f) - mean[b * s.G + g];
            one[c] = rstd[b * s.G + g];
            less[c] = shift * one[c];
            factor[c] = weight[i] * one[c];
            offset[c] = bias[i] + shift * factor[c];
        }
}

// dz into dx (rounded to T), and the sums of dz and dz hat per channel.
template <class T>
void slopes(const Shape s, const T *dy, const T *x, T *dx, const float *factor, const float *offset, const float *one,
            const float *less, float *s1, float *s2, uint32_t key, long from, long to) {
    const long C = s.C;
    entries(from, to, C, [=](long e, long c, auto lanes, auto below) {
        Floats f = load(factor + c, lanes), o = load(offset + c, lanes), sum = {};
        Floats scale = load(one + c, lanes), shift = load(less + c, lanes), product = {};
#pragma GCC unroll 4
        for (long i = 0; i < below.count; i++) {
            const long at = e + i * C;
            Floats value = load(x + at, lanes), d = load(dy + at, lanes);
            if (s.threshold) d = kept(s, d, (uint32_t)at, key);
            if (s.silu) d *= slope<T>(f * value + o);
            sum += d;
            product += d * (scale * value + shift);
            store(dx + at, d, lanes);
        }
        add(s1 + c, sum, lanes);
        add(s2 + c, product, lanes);
    });
}

// dx = factor dz + along x + level, and its sum per channel.
template <class T>
void gradient(const T *x, T *dx, const float *factor, const float *along, const float *level, float *total, long from,
              long to, long C) {
    entries(from, to, C, [=](long e, long c, auto lanes, auto below) {
        Floats f = load(factor + c, lanes), a = load(along + c, lanes), l = load(level + c, lanes), sum = {};
#pragma GCC unroll 4
        for (long i = 0; i < below.count; i++) {
            const long at = e + i * C;
            Floats value = f * load(dx + at, lanes) + a * load(x + at, lanes) + l;
            sum += value;
            store(dx + at, value, lanes);
        }
        add(total + c, sum, lanes);
    });
}

// Of image b, whose dy and dx are given; `inner` threads share it.
template <class T>
void backward(const Shape &s, long b, const T *dy, const T *image, const float *pre, const float *weight,
              const float *bias, const uint32_t *keys, const float *mean, const float *rstd, T *dx, float *dpre,
              float *dweight, float *dbias, int inner) {
    const long C = s.C, width = C / s.G;
    float factor[C], offset[C], one[C], less[C], along[C], level[C], totals[2 * C], moved[C];
    known(s, b, pre, weight, bias, mean, rstd, factor, offset, one, less);
    memset(totals, 0, sizeof totals);
    memset(moved, 0, sizeof moved);
    pixels(s, inner, totals, 2 * C, [&](float *part, long from, long to) {
        slopes(s, dy, image, dx, factor, offset, one, less, part, part + C, keys ? keys[b] : 0, from, to);
    });
    for (long g = 0; g < s.G; g++) {
        double a = 0, h = 0, n = (double)s.P * width;
        for (long c = g * width; c < (g + 1) * width; c++) {
            a += (double)weight[b * s.row + c] * totals[c];
            h += (double)weight[b * s.row + c] * totals[C + c];
        }
        a /= -n, h /= -n;
        for (long c = g * width; c < (g + 1) * width; c++) {
            along[c] = (float)(h * one[c] * one[c]);
            level[c] = (float)(a * one[c] + h * one[c] * less[c]);
        }
    }
    memcpy(dbias + b * C, totals, C * sizeof(float));
    memcpy(dweight + b * C, totals + C, C * sizeof(float));
    pixels(s, inner, moved, C,
           [&](float *part, long from, long to) { gradient(image, dx, factor, along, level, part, from, to, C); });
    if (dpre) memcpy(dpre + b * C, moved, sizeof moved);
}

// Sums over pixels [from, to) of du = dx + dpre and of hat du, per channel. No dx is a dx of zeros.
template <class T>
void changes(const T *dx, const T *x, const float *dpre, const float *one, const float *less, float *s1, float *s2,
             long from, long to, long C) {
    entries(from, to, C, [=](long e, long c, auto lanes, auto below) {
        Floats scale = load(one + c, lanes), shift = load(less + c, lanes), all = load(dpre + c, lanes);
        Floats sum = {}, product = {};
#pragma GCC unroll 4
        for (long i = 0; i < below.count; i++) {
            const long at = e + i * C;
            Floats d = dx ? all + load(dx + at, lanes) : all;
            sum += d;
            product += d * (scale * load(x + at, lanes) + shift);
        }
        add(s1 + c, sum, lanes);
        add(s2 + c, product, lanes);
    });
}

// dz = factor dx + along x + level, and dy from it.
template <class T>
void follow(const Shape s, const T *dx, const T *x, T *dy, const float *factor, const float *offset, const float *along,
            const float *level, uint32_t key, long from, long to) {
    const long C = s.C;
    entries(from, to, C, [=](long e, long c, auto lanes, auto below) {
        Floats f = load(factor + c, lanes), o = load(offset + c, lanes);
        Floats a = load(along + c, lanes), l = load(level + c, lanes);
#pragma GCC unroll 4
        for (long i = 0; i < below.count; i++) {
            const long at = e + i * C;
            Floats value = load(x + at, lanes), d = a * value + l;
            if (dx) d += f * load(dx + at, lanes);
            if (s.silu) d *= slope<T>(f * value + o);
            if (s.threshold) d = kept(s, d, (uint32_t)at, key);
            store(dy + at, d, lanes);
        }
    });
}

// The change dy of y while x, pre, weight and bias change by dx, dpre, dweight and dbias, any of which may be missing:
//
//     dhat = (du - mean(du) - hat mean(hat du)) rstd;  dz = weight dhat + dweight hat + dbias
template <class T>
void tangent(const Shape &s, const T *dx, const T *x, const float *pre, const float *weight, const float *bias,
             const uint32_t *keys, const float *mean, const float *rstd, const float *dpre, const float *dweight,
             const float *dbias, T *dy, int threads) {
    const long C = s.C, size = s.P * C, width = C / s.G;
    each(s, threads, [&](long b, int inner) {
        float factor[C], offset[C], one[C], less[C], along[C], level[C], shift[C], totals[2 * C];
        known(s, b, pre, weight, bias, mean, rstd, factor, offset, one, less);
        memset(totals, 0, sizeof totals);
        for (long c = 0; c < C; c++) shift[c] = dpre ? dpre[b * C + c] : 0.0f;
        const T *image = x + b * size, *moved = dx ? dx + b * size : nullptr;
        pixels(s, inner, totals, 2 * C, [&](float *part, long from, long to) {
            changes(moved, image, shift, one, less, part, part + C, from, to, C);
        });
        for (long g = 0; g < s.G; g++) {
            double a = 0, h = 0, n = (double)s.P * width;
            for (long c = g * width; c < (g + 1) * width; c++) {
                a += totals[c];
                h += totals[C + c];
            }
            a /= n, h /= n;
            for (long c = g * width; c < (g + 1) * width; c++) {
                double hat = (dweight ? dweight[b * C + c] : 0.0f) - factor[c] * h;
                along[c] = (float)(hat * one[c]);
                level[c] = (float)((dbias ? dbias[b * C + c] : 0.0f) + factor[c] * (shift[c] - a) + hat * less[c]);
            }
        }
        pixels(s, inner, nullptr, 0, [&](float *, long from, long to) {
            follow(s, moved, image, dy + b * size, factor, offset, along, level, keys ? keys[b] : 0, from, to);
        });
    });
}

}  // namespace

extern "C" {

void norm_forward(int half, const void *x, const float *pre, const float *weight, const float *bias,
                  const uint32_t *keys, void *y, float *mean, float *rstd, long B, long P, long C, long G, float eps,
                  int silu, uint32_t threshold, float grown, int threads) {
    Shape s = {B, P, C, G, C, eps, silu, threshold, grown};
    const auto all = [&](auto *in, auto *out) {
        each(s, threads, [&](long b, int inner) {
            const long at = b * P * C;
            forward(s, b, in + at, pre, weight, bias, keys, out + at, mean, rstd, inner);
        });
    };
    if (half) all((const bf16 *)x, (bf16 *)y);
    else all((const float *)x, (float *)y);
}

void norm_backward(int half, const void *dy, const void *x, const float *pre, const float *weight, const float *bias,
                   const uint32_t *keys, const float *mean, const float *rstd, void *dx, float *dpre, float *dweight,
                   float *dbias, long B, long P, long C, long G, float eps, int silu, uint32_t threshold, float grown,
                   int threads) {
    Shape s = {B, P, C, G, C, eps, silu, threshold, grown};
    const auto all = [&](auto *grad, auto *in, auto *out) {
        each(s, threads, [&](long b, int inner) {
            const long at = b * P * C;
            backward(s, b, grad + at, in + at, pre, weight, bias, keys, mean, rstd, out + at, dpre, dweight, dbias, inner);
        });
    };
    if (half) all((const bf16 *)dy, (const bf16 *)x, (bf16 *)dx);
    else all((const float *)dy, (const float *)x, (float *)dx);
}

// The chain around a convolution, of which a thread takes a few images at a time (winograd.cpp).
struct Chain {
    Shape s;
    int known;  // mean and rstd
    const float *x, *pre, *weight, *bias;
    const uint32_t *keys;
    float *mean, *rstd, *dx, *dpre, *dweight, *dbias;
};

// y of `count` images from `first` on.
void norm_images(const Chain *chain, long first, long count, float *y) {
    const Chain &a = *chain;
    const Shape &s = a.s;
    const long C = s.C, size = s.P * C;
    for (long b = first; b < first + count; b++, y += size) {
        const float *image = a.x + b * size;
        if (!a.known) {
            forward(s, b, image, a.pre, a.weight, a.bias, a.keys, y, a.mean, a.rstd, 1);
            continue;
        }
        float factor[C], offset[C], one[C], less[C];
        known(s, b, a.pre, a.weight, a.bias, a.mean, a.rstd, factor, offset, one, less);
        apply(s, image, y, factor, offset, a.keys ? a.keys[b] : 0, 0, s.P);
    }
}

// From dy of `count` images from `first` on.
void norm_gradients(const Chain *chain, long first, long count, const float *dy) {
    const Chain &a = *chain;
    const long size = a.s.P * a.s.C;
    for (long b = first; b < first + count; b++, dy += size)
        backward(a.s, b, dy, a.x + b * size, a.pre, a.weight, a.bias, a.keys, a.mean, a.rstd, a.dx + b * size, a.dpre,
                 a.dweight, a.dbias, 1);
}

void norm_tangent(int half, const void *dx, const void *x, const float *pre, const float *weight, const float *bias,
                  const uint32_t *keys, const float *mean, const float *rstd, const float *dpre, const float *dweight,
                  const float *dbias, void *dy, long B, long P, long C, long G, float eps, int silu, uint32_t threshold,
                  float grown, int threads) {
    Shape s = {B, P, C, G, C, eps, silu, threshold, grown};
    if (half)
        tangent(s, (const bf16 *)dx, (const bf16 *)x, pre, weight, bias, keys, mean, rstd, dpre, dweight, dbias,
                (bf16 *)dy, threads);
    else
        tangent(s, (const float *)dx, (const float *)x, pre, weight, bias, keys, mean, rstd, dpre, dweight, dbias,
                (float *)dy, threads);
}
}
