// Convolutions with 3x3 weights of channels-last float images on a CPU, by Winograd's minimal filtering F(4x4, 3x3): 4x4
// results take 36 products for each pair of channels instead of 144 (Lavin & Gray 2016, arXiv:1509.09308). The points are
// 0, P, -P, Q, -Q and infinity with P = 1 / sqrt(2) = 1 / Q: half the rounding errors of the usual 1 and 2.
//
//     y = A' [(G g G') . (B' d B)] A,     d: 6x6 numbers of the input, g: the 3x3 weights, y: 4x4 numbers of the output
//
// At each of the 36 places of the brackets the sum over input channels is a product of matrices: tiles x inputs times
// inputs x outputs. The gradient of the input is a convolution with the weights turned around; that of the weights is the
// adjoint of the formula, G' [(B' d B) . (A dy A')] G, with a sum over tiles.
//
// Arrays: images [B, H, W, C], padded with zeros by one pixel; weights by the strides of [outputs, inputs, 3, 3].
// Channels come in multiples of COLUMNS. The number of threads changes nothing but the last digits of weights' gradients.

#include <omp.h>
#include <string.h>

namespace {

#if defined(__AVX512F__)
constexpr long BYTES = 64, ROWS = 12;
#else
constexpr long BYTES = 32, ROWS = 6;
#endif
constexpr long LANES = BYTES / 4;
constexpr long COLUMNS = 2 * LANES;  // ROWS x COLUMNS of a product are summed in registers
constexpr long POINTS = 36;
constexpr long MOST = 24;  // tiles; see `tiles_at_once`
constexpr long GAP = 16;  // between the matrices of two points, which else lie in the same lines of the cache

#ifndef SUMS  // a test asks for less
#define SUMS (256L << 20)  // bytes that a gradient of weights keeps its sums in, at most
#endif

typedef float Floats __attribute__((vector_size(BYTES)));

inline Floats load(const float *from) {
    Floats out;
    memcpy(&out, from, BYTES);
    return out;
}
inline void store(float *to, Floats value) { memcpy(to, &value, BYTES); }

struct Shape {
    long B, H, W, inputs, outputs;
    long across() const { return (W + 3) / 4; }
    long down() const { return (H + 3) / 4; }
    long tiles() const { return B * down() * across(); }
};

struct Tile {
    long image, y, x;  // of its first result
    Tile(const Shape &s, long number)
        : image(number / (s.across() * s.down())),
          y(number / s.across() % s.down() * 4),
          x(number % s.across() * 4) {}
};

// --- the transforms of a line, each result `step` after the one before ------------------------------------------------

constexpr float P = 0.70710678f, Q = 1.41421356f;

// B' d
inline void forth(const Floats *d, Floats *out, long step) {
    Floats even1 = d[4] - 2 * d[2], odd1 = P * (d[3] - 2 * d[1]);
    Floats even2 = d[4] - 0.5f * d[2], odd2 = Q * (d[3] - 0.5f * d[1]);
    out[0] = d[0] - 2.5f * d[2] + d[4];
    out[step] = even1 + odd1;
    out[2 * step] = even1 - odd1;
    out[3 * step] = even2 + odd2;
    out[4 * step] = even2 - odd2;
    out[5 * step] = d[1] - 2.5f * d[3] + d[5];
}

// A' m
inline void back(const Floats *m, Floats *out, long step) {
    Floats even1 = m[1] + m[2], odd1 = P * (m[1] - m[2]), even2 = m[3] + m[4], odd2 = Q * (m[3] - m[4]);
    out[0] = m[0] + even1 + even2;
    out[step] = odd1 + odd2;
    out[2 * step] = 0.5f * even1 + 2 * even2;
    out[3 * step] = 0.5f * odd1 + 2 * odd2 + m[5];
}

// A dy
inline void back_adjoint(const Floats *dy, Floats *out, long step) {
    Floats even1 = dy[0] + 0.5f * dy[2], odd1 = P * (dy[1] + 0.5f * dy[3]);
    Floats even2 = dy[0] + 2 * dy[2], odd2 = Q * (dy[1] + 2 * dy[3]);
    out[0] = dy[0];
    out[step] = even1 + odd1;
    out[2 * step] = even1 - odd1;
    out[3 * step] = even2 + odd2;
    out[4 * step] = even2 - odd2;
    out[5 * step] = dy[3];
}

// G g
inline void weigh(const Floats *g, Floats *out, long step) {
    Floats even1 = (g[0] + 0.5f * g[2]) * (-2.0f / 3), odd1 = g[1] * (-2.0f / 3 * P);
    Floats even2 = (g[0] + 2 * g[2]) * (1.0f / 6), odd2 = g[1] * (1.0f / 6 * Q);
    out[0] = g[0];
    out[step] = even1 + odd1;
    out[2 * step] = even1 - odd1;
    out[3 * step] = even2 + odd2;
    out[4 * step] = even2 - odd2;
    out[5 * step] = g[2];
}

// G' u
inline void weigh_adjoint(const Floats *u, Floats *out, long step) {
    Floats even1 = (u[1] + u[2]) * (-2.0f / 3), even2 = (u[3] + u[4]) * (1.0f / 6);
    out[0] = u[0] + even1 + even2;
    out[step] = (u[1] - u[2]) * (-2.0f / 3 * P) + (u[3] - u[4]) * (1.0f / 6 * Q);
    out[2 * step] = 0.5f * even1 + 2 * even2 + u[5];
}

// --- tiles and their 36 points ----------------------------------------------------------------------------------------

// points[point][tile][channel] of `count` tiles from `first` on; a point's matrix begins `stride` after the one before.
void inputs_to_points(const Shape &s, const float *x, float *points, long stride, long first, long count) {
    const long C = s.inputs;
    for (long t = 0; t < count; t++) {
        const Tile tile(s, first + t);
        const float *corner = x + ((tile.image * s.H + tile.y - 1) * s.W + tile.x - 1) * C;
        const bool inside = tile.y > 0 && tile.x > 0 && tile.y + 5 <= s.H && tile.x + 5 <= s.W;
        for (long c = 0; c < C; c += LANES) {
            Floats half[6][6], line[6];
            for (long i = 0; i < 6; i++) {
                const bool row = (unsigned long)(tile.y - 1 + i) < (unsigned long)s.H;
                for (long j = 0; j < 6; j++) {
                    const bool there = inside || (row && (unsigned long)(tile.x - 1 + j) < (unsigned long)s.W);
                    line[j] = there ? load(corner + (i * s.W + j) * C + c) : Floats{};
                }
                forth(line, &half[0][i], 6);
            }
            for (long j = 0; j < 6; j++) {
                forth(half[j], line, 1);
                for (long i = 0; i < 6; i++) store(points + (i * 6 + j) * stride + t * C + c, line[i]);
            }
        }
    }
}

// Of channels [from, to) of the output, which alone are in `points`.
void gradients_to_points(const Shape &s, const float *dy, float *points, long stride, long first, long count, long from,
                         long to) {
    const long C = s.outputs;
    for (long t = 0; t < count; t++) {
        const Tile tile(s, first + t);
        const float *corner = dy + ((tile.image * s.H + tile.y) * s.W + tile.x) * C;
        const long rows = s.H - tile.y, columns = s.W - tile.x;
        for (long c = from; c < to; c += LANES) {
            Floats half[6][4], line[6];
            for (long i = 0; i < 4; i++) {
                for (long j = 0; j < 4; j++)
                    line[j] = i < rows && j < columns ? load(corner + (i * s.W + j) * C + c) : Floats{};
                back_adjoint(line, &half[0][i], 4);
            }
            for (long j = 0; j < 6; j++) {
                back_adjoint(half[j], line, 1);
                for (long i = 0; i < 6; i++) store(points + (i * 6 + j) * stride + t * (to - from) + c - from, line[i]);
            }
        }
    }
}

void points_to_outputs(const Shape &s, const float *points, const float *bias, float *y, long stride, long first,
                       long count) {
    const long C = s.outputs;
    for (long t = 0; t < count; t++) {
        const Tile tile(s, first + t);
        float *corner = y + ((tile.image * s.H + tile.y) * s.W + tile.x) * C;
        const long rows = s.H - tile.y < 4 ? s.H - tile.y : 4, columns = s.W - tile.x < 4 ? s.W - tile.x : 4;
        for (long c = 0; c < C; c += LANES) {
            const Floats added = bias ? load(bias + c) : Floats{};
            Floats half[4][6], line[6];
            for (long j = 0; j < 6; j++) {
                for (long i = 0; i < 6; i++) line[i] = load(points + (i * 6 + j) * stride + t * C + c);
                back(line, &half[0][j], 6);
            }
            for (long i = 0; i < rows; i++) {
                back(half[i], line, 1);
                for (long j = 0; j < columns; j++) store(corner + (i * s.W + j) * C + c, line[j] + added);
            }
        }
    }
}

// --- products of matrices ---------------------------------------------------------------------------------------------

// m [R, COLUMNS] = a [R, depth] b [depth, COLUMNS], or that added to it. A step goes along the depth; always inlined, so
// that what is constant where it is called (a step of 1) is so here.
template <long R>
inline __attribute__((always_inline)) void product(const float *a, long a_row, long a_step, const float *b, long b_step,
                                                   float *m, long m_row, long depth, bool added) {
    Floats sum[R][2] = {};
    for (long d = 0; d < depth; d++) {
        Floats left = load(b + d * b_step), right = load(b + d * b_step + LANES);
#pragma GCC unroll 12
        for (long r = 0; r < R; r++) {
            sum[r][0] += a[r * a_row + d * a_step] * left;
            sum[r][1] += a[r * a_row + d * a_step] * right;
        }
    }
    if (added) {  // at the end: sums of sums have fewer roundings than one long sum
#pragma GCC unroll 12
        for (long r = 0; r < R; r++) {
            sum[r][0] += load(m + r * m_row);
            sum[r][1] += load(m + r * m_row + LANES);
        }
    }
#pragma GCC unroll 12
    for (long r = 0; r < R; r++) {
        store(m + r * m_row, sum[r][0]);
        store(m + r * m_row + LANES, sum[r][1]);
    }
}

long least(long a, long b) { return a < b ? a : b; }

}  // namespace

extern "C" {

// What the numbers of channels are multiples of; 0 for processors where nobody has seen this gain anything.
long channels() {
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
    return COLUMNS;
#else
    return 0;
#endif
}

// How many tiles a thread takes through all of `forward` at a time: enough to be worth fetching the weights for, few
// enough for their points to stay in its cache, and no more than there are for it.
long tiles_at_once(long B, long H, long W, int threads) {
    const long share = (Shape{B, H, W, 0, 0}.tiles() + threads - 1) / threads;
    return least(MOST, (share + ROWS - 1) / ROWS * ROWS);
}

// Floats for the points of tiles on both sides.
long room(long tiles, long inputs, long outputs) { return POINTS * (tiles * (inputs + outputs) + 2 * GAP); }

// G g G' as [point][outputs / COLUMNS][input][COLUMNS].
void weights(const float *g, const long *strides, float *out, long inputs, long outputs, int threads) {
    const long panels = outputs / COLUMNS;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long block = 0; block < panels * inputs / COLUMNS; block++) {
        const long panel = block * COLUMNS / inputs, first = block * COLUMNS % inputs;
        // Read in the order of memory: one after the other, its lines would push each other out of the cache.
        float own[3][3][COLUMNS][COLUMNS];  // [y][x][input][output]
        const float *from = g + panel * COLUMNS * strides[0] + first * strides[1];
        const bool swap = strides[0] < strides[1];
        for (long slow = 0; slow < COLUMNS; slow++)
            for (long i = 0; i < 3; i++)
                for (long j = 0; j < 3; j++)
                    for (long fast = 0; fast < COLUMNS; fast++) {
                        const long o = swap ? fast : slow, c = swap ? slow : fast;
                        own[i][j][c][o] = from[o * strides[0] + c * strides[1] + i * strides[2] + j * strides[3]];
                    }
        for (long c = 0; c < COLUMNS; c++)
            for (long o = 0; o < COLUMNS; o += LANES) {
                Floats half[6][3], line[6];
                for (long j = 0; j < 3; j++) {
                    Floats column[3] = {load(&own[0][j][c][o]), load(&own[1][j][c][o]), load(&own[2][j][c][o])};
                    weigh(column, &half[0][j], 3);
                }
                for (long i = 0; i < 6; i++) {
                    weigh(half[i], line, 1);
                    for (long j = 0; j < 6; j++)
                        store(out + (((i * 6 + j) * panels + panel) * inputs + first + c) * COLUMNS + o, line[j]);
                }
            }
    }
}

// y; `scratch` has room(at_once, ...) for each thread.
void forward(const float *x, const float *weights, const float *bias, float *y, float *scratch, long B, long H, long W,
             long inputs, long outputs, long at_once, int threads) {
    const Shape s{B, H, W, inputs, outputs};
    const long tiles = s.tiles(), d_stride = at_once * inputs + GAP, m_stride = at_once * outputs + GAP;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long first = 0; first < tiles; first += at_once) {
        float *d = scratch + omp_get_thread_num() * room(at_once, inputs, outputs);
        float *m = d + POINTS * d_stride;
        const long count = least(at_once, tiles - first);
        inputs_to_points(s, x, d, d_stride, first, count);
        for (long point = 0; point < POINTS; point++)
            for (long o = 0; o < outputs; o += COLUMNS)
                for (long t = 0; t < count; t += ROWS)  // rows after the last tile are computed and not looked at
                    product<ROWS>(d + point * d_stride + t * inputs, inputs, 1, weights + (point * outputs + o) * inputs,
                                  COLUMNS, m + point * m_stride + t * outputs + o, outputs, inputs, false);
        points_to_outputs(s, m, bias, y, m_stride, first, count);
    }
}

// How many parts the threads' sums over tiles are kept in: one for each thread, as far as memory goes.
long parts(long inputs, long outputs, int threads) {
    const long most = SUMS / (POINTS * inputs * outputs * (long)sizeof(float));
    return most < 1 ? 1 : least(threads, most);
}

// dg, by its strides; `scratch` has room(at_once, ...) for each thread, `sums` [part][point][output][input].
//
// A part of the tiles belongs to one thread, or to several that share the outputs.
void weight_gradient(const float *x, const float *dy, float *dg, float *scratch, float *sums, const long *strides, long B,
                     long H, long W, long inputs, long outputs, long at_once, int threads) {
    const Shape s{B, H, W, inputs, outputs};
    const long kept = parts(inputs, outputs, threads), size = POINTS * inputs * outputs;
    const long sharing = least(threads / kept, outputs / LANES);
    const long tiles = (s.tiles() + kept - 1) / kept, slice = (outputs / LANES + sharing - 1) / sharing * LANES;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long job = 0; job < kept * sharing; job++) {
            const long part = job / sharing, begin = least(part * tiles, s.tiles()), end = least(begin + tiles, s.tiles());
            const long from = least(job % sharing * slice, outputs), to = least(from + slice, outputs), some = to - from;
            float *d = scratch + omp_get_thread_num() * room(at_once, inputs, outputs);
            const long d_stride = at_once * inputs + GAP, m_stride = at_once * some + GAP;
            float *m = d + POINTS * d_stride, *sum = sums + part * size;
            if (begin == end)
                for (long point = 0; point < POINTS; point++)
                    memset(sum + (point * outputs + from) * inputs, 0, some * inputs * sizeof(float));
            for (long first = begin; first < end; first += at_once) {
                const long count = least(at_once, end - first);
                inputs_to_points(s, x, d, d_stride, first, count);
                gradients_to_points(s, dy, m, m_stride, first, count, from, to);
                for (long point = 0; point < POINTS; point++)
                    for (long c = 0; c < inputs; c += COLUMNS) {
                        const float *a = m + point * m_stride, *b = d + point * d_stride + c;
                        float *into = sum + (point * outputs + from) * inputs + c;
                        const bool added = first > begin;
                        long o = 0;
                        for (; o + ROWS <= some; o += ROWS)
                            product<ROWS>(a + o, 1, some, b, inputs, into + o * inputs, inputs, count, added);
                        for (; o + 4 <= some; o += 4)
                            product<4>(a + o, 1, some, b, inputs, into + o * inputs, inputs, count, added);
                        for (; o < some; o += 2)
                            product<2>(a + o, 1, some, b, inputs, into + o * inputs, inputs, count, added);
                    }
            }
        }
#pragma omp for schedule(static)
        for (long o = 0; o < outputs; o++)
            for (long c = 0; c < inputs; c += LANES) {
                Floats half[6][3], line[6], out[3];
                for (long i = 0; i < 6; i++) {
                    for (long j = 0; j < 6; j++) {
                        const float *sum = sums + ((i * 6 + j) * outputs + o) * inputs + c;
                        line[j] = load(sum);
                        for (long part = 1; part < kept; part++) line[j] += load(sum + part * size);
                    }
                    weigh_adjoint(line, half[i], 1);
                }
                for (long j = 0; j < 3; j++) {
                    for (long i = 0; i < 6; i++) line[i] = half[i][j];
                    weigh_adjoint(line, out, 1);
                    for (long i = 0; i < 3; i++) {
                        float *to = dg + o * strides[0] + c * strides[1] + i * strides[2] + j * strides[3];
                        for (long l = 0; l < LANES; l++) to[l * strides[1]] = out[i][l];
                    }
                }
            }
    }
}
}
