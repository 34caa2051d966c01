// The chain norm, scale and shift, SiLU, dropout in one pass over memory, for channels-last images on a CPU.
//
// Arrays: x, y, dy, dx are [B, P, C] (P pixels) of T, float or bfloat16; pre, weight, bias and their gradients [B, C] and
// mean, rstd [B, G] are float. All arithmetic is in float; each result is rounded once.
//
//     u = x + pre;  hat = (u - mean) rstd;  z = weight hat + bias;  y = keep(silu(z))
//
// Images are shared out to threads; where there are fewer images than threads, the pixels of each image are.

#include <omp.h>
#include <stdint.h>
#include <string.h>

// Loops over memory are functions of their own: inside of what OpenMP makes of a parallel region the compiler finds
// their accesses too complicated for vector instructions.
#define ALONE __attribute__((noinline))

namespace {

struct bf16 {
    uint16_t bits;
};

inline float load(float value) { return value; }
inline float load(bf16 value) {
    uint32_t wide = (uint32_t)value.bits << 16;
    float out;
    memcpy(&out, &wide, 4);
    return out;
}
inline void store(float &place, float value) { place = value; }
inline void store(bf16 &place, float value) {
    uint32_t wide;
    memcpy(&wide, &value, 4);
    uint32_t even = (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16;
    place.bits = (wide & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : (uint16_t)even;
}

// exp(-|x|) within 2 units in the last place; what is beyond 87 counts as 87. Written out so that the compiler turns it
// into vector instructions. The limit is a minimum of whole numbers, the bits of |x|: of a choice between floats it makes
// results for both ends and picks later, and an entry times the smallest number there is takes a hundred times as long.
inline float decay(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits &= 0x7FFFFFFF;
    bits = bits < 0x42AE0000 ? bits : 0x42AE0000;
    memcpy(&x, &bits, 4);
    float n = (x * -1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest whole number: 1.5 * 2^23 has no fractions
    float r = -x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t scale = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &scale, 4);
    return p * power;
}

inline float sigmoid(float z) {
    float e = decay(z);
    return (z >= 0 ? 1.0f : e) / (1.0f + e);
}

// A number for each entry of a sample; `layers.kept` is the same function. Entries below the threshold are dropped.
inline uint32_t mixed(uint32_t entry, uint32_t key) {
    uint32_t h = (entry * 0x9E3779B1u) ^ key;
    h = (h ^ (h >> 16)) * 0x7FEB352Du;
    h = (h ^ (h >> 15)) * 0x846CA68Bu;
    return h ^ (h >> 16);
}

struct Shape {
    long B, P, C, G;
    float eps;
    int silu;
    uint32_t threshold;  // 0: nothing is dropped
    float grown;         // what the entries that stay are multiplied with
};

// Sums over pixels [from, to) of u - origin and its square, per channel.
template <class T>
ALONE void sums(const T *__restrict x, const float *__restrict origin, float *__restrict s1, float *__restrict s2,
                long from, long to, long C) {
    long p = from;
    for (; p + 4 <= to; p += 4) {
        const T *r0 = x + p * C, *r1 = r0 + C, *r2 = r1 + C, *r3 = r2 + C;
#pragma omp simd
        for (long c = 0; c < C; c++) {
            float o = origin[c];
            float a = load(r0[c]) - o, b = load(r1[c]) - o, d = load(r2[c]) - o, e = load(r3[c]) - o;
            s1[c] += (a + b) + (d + e);
            s2[c] += (a * a + b * b) + (d * d + e * e);
        }
    }
    for (; p < to; p++) {
        const T *row = x + p * C;
#pragma omp simd
        for (long c = 0; c < C; c++) {
            float a = load(row[c]) - origin[c];
            s1[c] += a;
            s2[c] += a * a;
        }
    }
}

// Mean and 1 / deviation of each group from the sums; then factor and offset of each channel: z = factor x + offset.
void finish(const Shape &s, const float *origin, const float *pre, const float *s1, const float *s2, const float *weight,
            const float *bias, float *mean, float *rstd, float *factor, float *offset) {
    long width = s.C / s.G;
    double count = (double)s.P;
    for (long g = 0; g < s.G; g++) {
        double m = 0, squares = 0;
        for (long c = g * width; c < (g + 1) * width; c++)
            m += (double)origin[c] + (pre ? pre[c] : 0.0f) + s1[c] / count;
        m /= width;
        for (long c = g * width; c < (g + 1) * width; c++) {
            double own = (double)origin[c] + (pre ? pre[c] : 0.0f) + s1[c] / count;
            squares += s2[c] / count - (s1[c] / count) * (s1[c] / count) + (own - m) * (own - m);
        }
        double variance = squares / width;
        mean[g] = (float)m;
        rstd[g] = (float)(1.0 / __builtin_sqrt((variance > 0 ? variance : 0) + s.eps));
        for (long c = g * width; c < (g + 1) * width; c++) {
            factor[c] = weight[c] * rstd[g];
            offset[c] = bias[c] + (float)(((pre ? pre[c] : 0.0f) - m) * factor[c]);
        }
    }
}

template <class T, bool SILU, bool DROP>
ALONE void apply(const Shape &s, const T *__restrict x, T *__restrict y, const float *__restrict factor,
                 const float *__restrict offset, uint32_t key, long from, long to) {
    const long C = s.C;
    for (long p = from; p < to; p++) {
        const T *in = x + p * C;
        T *out = y + p * C;
        uint32_t first = (uint32_t)(p * C);
#pragma omp simd
        for (long c = 0; c < C; c++) {
            float z = factor[c] * load(in[c]) + offset[c];
            float value = SILU ? z * sigmoid(z) : z;
            if (DROP) value = mixed(first + (uint32_t)c, key) < s.threshold ? 0.0f : value * s.grown;
            store(out[c], value);
        }
    }
}

template <class T>
void apply_any(const Shape &s, const T *x, T *y, const float *factor, const float *offset, uint32_t key, long from,
               long to) {
    if (s.silu && s.threshold) apply<T, true, true>(s, x, y, factor, offset, key, from, to);
    else if (s.silu) apply<T, true, false>(s, x, y, factor, offset, key, from, to);
    else if (s.threshold) apply<T, false, true>(s, x, y, factor, offset, key, from, to);
    else apply<T, false, false>(s, x, y, factor, offset, key, from, to);
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

template <class T>
void forward(const Shape &s, const T *x, const float *pre, const float *weight, const float *bias, const uint32_t *keys,
             T *y, float *mean, float *rstd, int threads) {
    const long C = s.C, size = s.P * C;
    each(s, threads, [&](long b, int inner) {
        const T *image = x + b * size;
        const float *own = pre ? pre + b * C : nullptr;
        float origin[C], factor[C], offset[C], totals[2 * C];
        memset(totals, 0, sizeof totals);
        for (long c = 0; c < C; c++) origin[c] = load(image[c]);  // near the mean: squares lose no digits
        if (inner == 1) {
            sums(image, origin, totals, totals + C, 0, s.P, C);
        } else {
#pragma omp parallel num_threads(inner)
            {
                long n = omp_get_num_threads(), i = omp_get_thread_num();
                float part[2 * C];
                memset(part, 0, sizeof part);
                sums(image, origin, part, part + C, s.P * i / n, s.P * (i + 1) / n, C);
#pragma omp for ordered schedule(static, 1)
                for (long k = 0; k < n; k++) {
#pragma omp ordered
                    for (long c = 0; c < 2 * C; c++) totals[c] += part[c];
                }
            }
        }
        finish(s, origin, own, totals, totals + C, weight + b * C, bias + b * C, mean + b * s.G, rstd + b * s.G, factor,
               offset);
        uint32_t key = keys ? keys[b] : 0;
        if (inner == 1) {
            apply_any(s, image, y + b * size, factor, offset, key, 0, s.P);
        } else {
#pragma omp parallel num_threads(inner)
            {
                long n = omp_get_num_threads(), i = omp_get_thread_num();
                apply_any(s, image, y + b * size, factor, offset, key, s.P * i / n, s.P * (i + 1) / n);
            }
        }
    });
}

// dz into dx (rounded to T), and the sums of dz and dz hat per channel.
template <class T, bool SILU, bool DROP>
ALONE void slopes(const Shape &s, const T *__restrict dy, const T *__restrict x, T *__restrict dx,
                  const float *__restrict factor, const float *__restrict offset, const float *__restrict one,
                  const float *__restrict less, float *__restrict s1, float *__restrict s2, uint32_t key, long from,
                  long to) {
    const long C = s.C;
    for (long p = from; p < to; p++) {
        const T *in = x + p * C, *grad = dy + p * C;
        T *out = dx + p * C;
        uint32_t first = (uint32_t)(p * C);
#pragma omp simd
        for (long c = 0; c < C; c++) {
            float value = load(in[c]), d = load(grad[c]);
            if (DROP) d = mixed(first + (uint32_t)c, key) < s.threshold ? 0.0f : d * s.grown;
            if (SILU) {
                float z = factor[c] * value + offset[c], on = sigmoid(z);
                d *= on * (1.0f + z * (1.0f - on));
            }
            s1[c] += d;
            s2[c] += d * (one[c] * value + less[c]);
            store(out[c], d);
        }
    }
}

template <class T>
void slopes_any(const Shape &s, const T *dy, const T *x, T *dx, const float *factor, const float *offset,
                const float *one, const float *less, float *s1, float *s2, uint32_t key, long from, long to) {
    if (s.silu && s.threshold) slopes<T, true, true>(s, dy, x, dx, factor, offset, one, less, s1, s2, key, from, to);
    else if (s.silu) slopes<T, true, false>(s, dy, x, dx, factor, offset, one, less, s1, s2, key, from, to);
    else if (s.threshold) slopes<T, false, true>(s, dy, x, dx, factor, offset, one, less, s1, s2, key, from, to);
    else slopes<T, false, false>(s, dy, x, dx, factor, offset, one, less, s1, s2, key, from, to);
}

// dx = factor dz + slope x + level, and its sum per channel.
template <class T>
ALONE void gradient(const T *__restrict x, T *__restrict dx, const float *__restrict factor,
                    const float *__restrict slope, const float *__restrict level, float *__restrict total, long from,
                    long to, long C) {
    for (long p = from; p < to; p++) {
        const T *in = x + p * C;
        T *out = dx + p * C;
#pragma omp simd
        for (long c = 0; c < C; c++) {
            float value = factor[c] * load(out[c]) + slope[c] * load(in[c]) + level[c];
            total[c] += value;
            store(out[c], value);
        }
    }
}

template <class T>
void backward(const Shape &s, const T *dy, const T *x, const float *pre, const float *weight, const float *bias,
              const uint32_t *keys, const float *mean, const float *rstd, T *dx, float *dpre, float *dweight,
              float *dbias, int threads) {
    const long C = s.C, size = s.P * C, width = C / s.G;
    each(s, threads, [&](long b, int inner) {
        float factor[C], offset[C], one[C], less[C], slope[C], level[C], totals[2 * C], moved[C];
        for (long c = 0; c < C; c++) {
            float m = mean[b * s.G + c / width], r = rstd[b * s.G + c / width], shift = (pre ? pre[b * C + c] : 0.0f) - m;
            one[c] = r;
            less[c] = shift * r;
            factor[c] = weight[b * C + c] * r;
            offset[c] = bias[b * C + c] + shift * factor[c];
        }
        memset(totals, 0, sizeof totals);
        memset(moved, 0, sizeof moved);
        const T *image = x + b * size, *grad = dy + b * size;
        T *out = dx + b * size;
        uint32_t key = keys ? keys[b] : 0;
        if (inner == 1) {
            slopes_any(s, grad, image, out, factor, offset, one, less, totals, totals + C, key, 0, s.P);
        } else {
#pragma omp parallel num_threads(inner)
            {
                long n = omp_get_num_threads(), i = omp_get_thread_num();
                float part[2 * C];
                memset(part, 0, sizeof part);
                slopes_any(s, grad, image, out, factor, offset, one, less, part, part + C, key, s.P * i / n,
                           s.P * (i + 1) / n);
#pragma omp for ordered schedule(static, 1)
                for (long k = 0; k < n; k++) {
#pragma omp ordered
                    for (long c = 0; c < 2 * C; c++) totals[c] += part[c];
                }
            }
        }
        for (long g = 0; g < s.G; g++) {
            double a = 0, h = 0;
            for (long c = g * width; c < (g + 1) * width; c++) {
                a += (double)weight[b * C + c] * totals[c];
                h += (double)weight[b * C + c] * totals[C + c];
            }
            double r = rstd[b * s.G + g], n = (double)s.P * width;
            for (long c = g * width; c < (g + 1) * width; c++) {
                double shift = (double)(pre ? pre[b * C + c] : 0.0f) - mean[b * s.G + g];
                slope[c] = (float)(-h / n * r * r);
                level[c] = (float)(-a / n * r - h / n * r * r * shift);
            }
        }
        for (long c = 0; c < C; c++) {
            dbias[b * C + c] = totals[c];
            dweight[b * C + c] = totals[C + c];
        }
        if (inner == 1) {
            gradient(image, out, factor, slope, level, moved, 0, s.P, C);
        } else {
#pragma omp parallel num_threads(inner)
            {
                long n = omp_get_num_threads(), i = omp_get_thread_num();
                float part[C];
                memset(part, 0, sizeof part);
                gradient(image, out, factor, slope, level, part, s.P * i / n, s.P * (i + 1) / n, C);
#pragma omp for ordered schedule(static, 1)
                for (long k = 0; k < n; k++) {
#pragma omp ordered
                    for (long c = 0; c < C; c++) moved[c] += part[c];
                }
            }
        }
        if (dpre) memcpy(dpre + b * C, moved, sizeof moved);
    });
}

}  // namespace

extern "C" {

void norm_forward(int half, const void *x, const float *pre, const float *weight, const float *bias,
                  const uint32_t *keys, void *y, float *mean, float *rstd, long B, long P, long C, long G, float eps,
                  int silu, uint32_t threshold, float grown, int threads) {
    Shape s = {B, P, C, G, eps, silu, threshold, grown};
    if (half) forward(s, (const bf16 *)x, pre, weight, bias, keys, (bf16 *)y, mean, rstd, threads);
    else forward(s, (const float *)x, pre, weight, bias, keys, (float *)y, mean, rstd, threads);
}

void norm_backward(int half, const void *dy, const void *x, const float *pre, const float *weight, const float *bias,
                   const uint32_t *keys, const float *mean, const float *rstd, void *dx, float *dpre, float *dweight,
                   float *dbias, long B, long P, long C, long G, float eps, int silu, uint32_t threshold, float grown,
                   int threads) {
    Shape s = {B, P, C, G, eps, silu, threshold, grown};
    if (half)
        backward(s, (const bf16 *)dy, (const bf16 *)x, pre, weight, bias, keys, mean, rstd, (bf16 *)dx, dpre, dweight,
                 dbias, threads);
    else
        backward(s, (const float *)dy, (const float *)x, pre, weight, bias, keys, mean, rstd, (float *)dx, dpre, dweight,
                 dbias, threads);
}
}
