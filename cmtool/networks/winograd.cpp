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
constexpr long LEFT = 4;  // rows, where fewer are left
constexpr long POINTS = 36;
constexpr long MOST = 12;  // tiles; see `tiles_at_once`
constexpr long GAP = 16;  // between the matrices of two points, which else lie in the same lines of the cache

#ifndef SUMS  // a test asks for less
#define SUMS (256L << 20)  // bytes that a gradient of weights keeps its sums in, at most
#endif

#define INLINE __attribute__((always_inline))  // where what is constant at the call is to be so inside

typedef float Floats __attribute__((vector_size(BYTES)));

inline Floats load(const float *from) {
    Floats out;
    memcpy(&out, from, BYTES);
    return out;
}
inline void store(float *to, Floats value) { memcpy(to, &value, BYTES); }
inline long least(long a, long b) { return a < b ? a : b; }

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

// --- the transforms of a line -----------------------------------------------------------------------------------------

constexpr float P = 0.70710678f, Q = 1.41421356f;

// Both ways to six points have a first one, even + P odd, even - P odd, even + Q odd, even - Q odd and a last one, of
// numbers d(0), d(1), ...

struct Inputs {  // B' d
    static constexpr long SIDE = 6, BEFORE = 1;  // numbers, and how many pixels before the results they begin
    template <class D> static Floats first(D d) { return d(0) - 2.5f * d(2) + d(4); }
    template <class D> static Floats even_p(D d) { return d(4) - 2 * d(2); }
    template <class D> static Floats odd_p(D d) { return d(3) - 2 * d(1); }
    template <class D> static Floats even_q(D d) { return d(4) - 0.5f * d(2); }
    template <class D> static Floats odd_q(D d) { return d(3) - 0.5f * d(1); }
    template <class D> static Floats last(D d) { return d(1) - 2.5f * d(3) + d(5); }
};

struct Gradients {  // A dy
    static constexpr long SIDE = 4, BEFORE = 0;
    template <class D> static Floats first(D d) { return d(0); }
    template <class D> static Floats even_p(D d) { return d(0) + 0.5f * d(2); }
    template <class D> static Floats odd_p(D d) { return d(1) + 0.5f * d(3); }
    template <class D> static Floats even_q(D d) { return d(0) + 2 * d(2); }
    template <class D> static Floats odd_q(D d) { return d(1) + 2 * d(3); }
    template <class D> static Floats last(D d) { return d(3); }
};

// A' m, each result `step` after the one before
template <class M>
INLINE inline void back(M m, Floats *out, long step) {
    const Floats m1 = m(1), m2 = m(2), m3 = m(3), m4 = m(4);
    const Floats even_p = m1 + m2, odd_p = m1 - m2, even_q = m3 + m4, odd_q = m3 - m4;
    out[0] = m(0) + even_p + even_q;
    out[step] = P * odd_p + Q * odd_q;
    out[2 * step] = 0.5f * even_p + 2 * even_q;
    out[3 * step] = 0.5f * P * odd_p + 2 * Q * odd_q + m(5);
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

// Six points of a row, each `stride` after the one before; where the next row's begin.
template <class Line>
INLINE inline float *row_of_points(const Floats *half, float *to, long stride) {
    const auto d = [=](long i) INLINE { return half[i]; };
    const Floats even_p = Line::even_p(d), odd_p = Line::odd_p(d), even_q = Line::even_q(d), odd_q = Line::odd_q(d);
    store(to, Line::first(d)), to += stride;
    store(to, even_p + P * odd_p), to += stride;
    store(to, even_p - P * odd_p), to += stride;
    store(to, even_q + Q * odd_q), to += stride;
    store(to, even_q - Q * odd_q), to += stride;
    store(to, Line::last(d)), to += stride;
    return to;
}

// The points of LANES channels of a tile, whose rows lie `row` and whose columns `column` after the one before. Its
// numbers are read once for each row or pair of rows of points: what all six rows need does not fit into registers.
template <class Line>
INLINE inline void points_of(const float *tile, long row, long column, float *to, long stride) {
    Floats a[Line::SIDE], b[Line::SIDE];
    const auto columns = [=](auto use) INLINE {
        const float *at = tile;
#pragma GCC unroll 6
        for (long j = 0; j < Line::SIDE; j++, at += column) use(j, [=](long i) INLINE { return load(at + i * row); });
    };
    columns([&](long j, auto d) INLINE { a[j] = Line::first(d); });
    to = row_of_points<Line>(a, to, stride);
    columns([&](long j, auto d) INLINE {
        const Floats even = Line::even_p(d), odd = Line::odd_p(d);
        a[j] = even + P * odd, b[j] = even - P * odd;
    });
    to = row_of_points<Line>(b, row_of_points<Line>(a, to, stride), stride);
    columns([&](long j, auto d) INLINE {
        const Floats even = Line::even_q(d), odd = Line::odd_q(d);
        a[j] = even + Q * odd, b[j] = even - Q * odd;
    });
    to = row_of_points<Line>(b, row_of_points<Line>(a, to, stride), stride);
    columns([&](long j, auto d) INLINE { a[j] = Line::last(d); });
    row_of_points<Line>(a, to, stride);
}

// points[point][tile][channel] of `count` tiles from `first` on, and of channels [from, to) of images [B, H, W, C], which
// alone are there; a point's matrix begins `stride` after the one before.
template <class Line>
void to_points(const Shape &s, const float *images, long C, long from, long to, float *points, long stride, long first,
               long count) {
    for (long t = 0; t < count; t++) {
        const Tile tile(s, first + t);
        const long y = tile.y - Line::BEFORE, x = tile.x - Line::BEFORE;
        const float *corner = images + ((tile.image * s.H + y) * s.W + x) * C;
        float *out = points + t * (to - from) - from;
        if (y >= 0 && x >= 0 && y + Line::SIDE <= s.H && x + Line::SIDE <= s.W) {
            for (long c = from; c < to; c += LANES) points_of<Line>(corner + c, s.W * C, C, out + c, stride);
            continue;
        }
        for (long c = from; c < to; c += LANES) {
            Floats padded[Line::SIDE][Line::SIDE];
            for (long i = 0; i < Line::SIDE; i++)
                for (long j = 0; j < Line::SIDE; j++) {
                    const bool there = y + i >= 0 && y + i < s.H && x + j >= 0 && x + j < s.W;
                    padded[i][j] = there ? load(corner + (i * s.W + j) * C + c) : Floats{};
                }
            points_of<Line>((const float *)padded, Line::SIDE * LANES, LANES, out + c, stride);
        }
    }
}

void points_to_outputs(const Shape &s, const float *points, const float *bias, float *y, long stride, long first,
                       long count) {
    const long C = s.outputs, row = 6 * stride;
    for (long t = 0; t < count; t++) {
        const Tile tile(s, first + t);
        float *corner = y + ((tile.image * s.H + tile.y) * s.W + tile.x) * C;
        const long rows = least(4, s.H - tile.y), columns = least(4, s.W - tile.x);
        for (long c = 0; c < C; c += LANES) {
            const Floats added = bias ? load(bias + c) : Floats{};
            const float *at = points + t * C + c;
            Floats half[4][6], line[4];
#pragma GCC unroll 6
            for (long j = 0; j < 6; j++, at += stride)
                back([=](long i) INLINE { return load(at + i * row); }, &half[0][j], 6);
            float *to = corner + c;
            for (long i = 0; i < rows; i++, to += s.W * C) {
                back([&](long j) INLINE { return half[i][j]; }, line, 1);
                for (long j = 0; j < columns; j++) store(to + j * C, line[j] + added);
            }
        }
    }
}

// What is read or written next, fetched while products are computed: a part for each of the points.
class Ahead {
    static constexpr long LINE = 64;
    const char *at, *end;
    long part;

    static const char *row(const Shape &s, const float *images, long C, long tile, long after) {
        const Tile first(s, tile);
        return (const char *)(images + least(first.image * s.H + first.y + after, s.B * s.H) * s.W * C);
    }

public:
    // Images [B, H, W, C] from `after` rows below a tile's first on, up to as many below another one's.
    Ahead(const Shape &s, const float *images, long C, long tile, long last, long after)
        : at(row(s, images, C, tile, after)), end(row(s, images, C, last, after)), part((end - at) / POINTS + LINE) {}

    template <int USE>
    INLINE void fetch() {
        for (long left = part; left > 0 && at < end; left -= LINE, at += LINE) __builtin_prefetch(at, USE, 2);
    }
};
constexpr int READ = 0, WRITTEN = 1;

// --- products of matrices ---------------------------------------------------------------------------------------------

// m [R, COLUMNS] = a [R, depth] b [depth, COLUMNS], or that added to it. A step goes along the depth; always inlined, so
// that what is constant where it is called (a step of 1) is so here.
template <long R>
INLINE inline void product(const float *a, long a_row, long a_step, const float *b, long b_step, float *m, long m_row,
                           long depth, bool added) {
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

// m [count, outputs] = d [count, inputs] times the weights of a point; up to three rows more are computed, at which nobody
// looks.
void all_products(const float *d, const float *weights, float *m, long count, long inputs, long outputs) {
    for (long o = 0; o < outputs; o += COLUMNS) {
        const float *panel = weights + o * inputs;
        long t = 0;
        for (; t + ROWS <= count; t += ROWS)
            product<ROWS>(d + t * inputs, inputs, 1, panel, COLUMNS, m + t * outputs + o, outputs, inputs, false);
        for (; t < count; t += LEFT)
            product<LEFT>(d + t * inputs, inputs, 1, panel, COLUMNS, m + t * outputs + o, outputs, inputs, false);
    }
}

// `count` images from the one numbered `first` on, in the cache of a thread: to be made, or to be used.
struct Hook {
    void (*run)(const void *context, long first, long count, float *images);
    const void *context;
};

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
#pragma GCC unroll 3
                for (long j = 0; j < 3; j++) {
                    Floats column[3] = {load(&own[0][j][c][o]), load(&own[1][j][c][o]), load(&own[2][j][c][o])};
                    weigh(column, &half[0][j], 3);
                }
#pragma GCC unroll 6
                for (long i = 0; i < 6; i++) {
                    weigh(half[i], line, 1);
#pragma GCC unroll 6
                    for (long j = 0; j < 6; j++)
                        store(out + (((i * 6 + j) * panels + panel) * inputs + first + c) * COLUMNS + o, line[j]);
                }
            }
    }
}

// y. A pixel of x begins `step` after the one before: there may be more channels than are convolved. `before`, if it is
// there, makes of x what is convolved, and `after` uses the results, which are kept nowhere then (y is nothing): each thread
// takes `group` images at a time through all of it. `scratch` has, for each thread, room(at_once, ...) and the images of both
// hooks.
void forward(const float *x, long step, const float *weights, const float *bias, float *y, float *scratch, long B, long H,
             long W, long inputs, long outputs, long at_once, long group, const Hook *before, const Hook *after, int threads) {
    const Shape s{B, H, W, inputs, outputs};
    const long tiles = s.tiles(), d_stride = at_once * inputs + GAP, m_stride = at_once * outputs + GAP;
    const long points = room(at_once, inputs, outputs), made = before ? group * H * W * inputs : 0;
    const long own = points + made + (after ? group * H * W * outputs : 0);
    // Tiles [first, last) of `part`, which begins `offset` tiles after the first image; x is fetched `ahead` tiles before.
    const auto convolve = [&](const Shape &part, const float *from, float *to, float *d, long first, long last, long offset,
                              long ahead) {
        float *m = d + POINTS * d_stride;
        for (; first < last; first += at_once) {
            const long count = least(at_once, last - first), here = offset + first;
            to_points<Inputs>(part, from, before ? inputs : step, 0, inputs, d, d_stride, first, count);
            // Tiles that follow have seen a row below the last results already.
            Ahead next_x(s, x, step, here + ahead, here + ahead + at_once, before ? 0 : 1);
            Ahead own_y(s, after ? x : y, outputs, here, after ? here : here + count, 0);
            for (long point = 0; point < POINTS; point++) {
                next_x.fetch<READ>(), own_y.fetch<WRITTEN>();
                all_products(d + point * d_stride, weights + point * outputs * inputs, m + point * m_stride, count, inputs,
                             outputs);
            }
            points_to_outputs(part, m, bias, to, m_stride, first, count);
        }
    };
#pragma omp parallel num_threads(threads)
    {
        const long n = omp_get_num_threads(), i = omp_get_thread_num();
        float *d = scratch + i * own;
        if (before || after) {
            for (long image = B * i / n, end = B * (i + 1) / n; image < end; image += group) {
                const Shape part{least(group, end - image), H, W, inputs, outputs};
                const float *from = before ? d + points : x + image * H * W * step;
                float *to = after ? d + points + made : y + image * H * W * outputs;
                if (before) before->run(before->context, image, part.B, d + points);
                const long offset = image * s.across() * s.down();
                convolve(part, from, to, d, 0, part.tiles(), offset, before ? part.tiles() : at_once);
                if (after) after->run(after->context, image, part.B, to);
            }
        } else {
            const long chunks = (tiles + at_once - 1) / at_once;
            convolve(s, x, y, d, chunks * i / n * at_once, least(chunks * (i + 1) / n * at_once, tiles), 0, at_once);
        }
    }
}

// How many parts the threads' sums over tiles are kept in: one for each thread, as far as memory goes.
long parts(long inputs, long outputs, int threads) {
    const long most = SUMS / (POINTS * inputs * outputs * (long)sizeof(float));
    return most < 1 ? 1 : least(threads, most);
}

// dg, by its strides; `scratch` has room(at_once, ...) for each thread, `sums` are [part][point][inputs / COLUMNS][output]
// [COLUMNS], in the order in which they are added to.
//
// A pixel of dy begins `step` after the one before. A part of the tiles belongs to one thread, or to several that share the
// outputs. `before` makes of x what was convolved, `group` images at a time, for which the scratch has room, too.
void weight_gradient(const float *x, const float *dy, long step, float *dg, float *scratch, float *sums,
                     const long *strides, long B, long H, long W, long inputs, long outputs, long at_once, long group,
                     const Hook *before, int threads) {
    const Shape s{B, H, W, inputs, outputs};
    const long kept = parts(inputs, outputs, threads), size = POINTS * inputs * outputs;
    const long sharing = least(threads / kept, outputs / LANES);
    const long each = s.across() * s.down(), points = room(at_once, inputs, outputs);
    const long own = points + (before ? group * H * W * inputs : 0);
    const long tiles = before ? (B + kept - 1) / kept * each : (s.tiles() + kept - 1) / kept;
    const long slice = (outputs / LANES + sharing - 1) / sharing * LANES;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long job = 0; job < kept * sharing; job++) {
            const long part = job / sharing, begin = least(part * tiles, s.tiles()), end = least(begin + tiles, s.tiles());
            const long from = least(job % sharing * slice, outputs), to = least(from + slice, outputs), some = to - from;
            float *d = scratch + omp_get_thread_num() * own;
            const long d_stride = at_once * inputs + GAP, m_stride = at_once * some + GAP;
            float *m = d + POINTS * d_stride, *sum = sums + part * size;
            if (begin == end)
                for (long panel = 0; panel < POINTS * inputs / COLUMNS; panel++)
                    memset(sum + (panel * outputs + from) * COLUMNS, 0, some * COLUMNS * sizeof(float));
            const float *images = x;
            long made = 0, limit = begin;  // tiles [made, limit) are at `images`
            for (long first = begin, count; first < end; first += count) {
                if (first == limit) {
                    limit = before ? least(first + group * each, end) : end;
                    if (before) {
                        made = first, images = d + points;
                        before->run(before->context, first / each, (limit - first) / each, d + points);
                    }
                }
                count = least(at_once, limit - first);
                to_points<Inputs>(s, images, inputs, 0, inputs, d, d_stride, first - made, count);
                to_points<Gradients>(s, dy, step, from, to, m, m_stride, first, count);
                const long next = first + count, last = next + at_once, ahead = before ? first + group * each : next;
                Ahead next_x(s, x, inputs, ahead, ahead + at_once, before ? 0 : 1), next_dy(s, dy, step, next, last, 0);
                for (long point = 0; point < POINTS; point++) {
                    next_x.fetch<READ>(), next_dy.fetch<READ>();
                    for (long c = 0; c < inputs; c += COLUMNS) {
                        const float *a = m + point * m_stride, *b = d + point * d_stride + c;
                        float *into = sum + (point * inputs + c) * outputs + from * COLUMNS;
                        const bool added = first > begin;
                        long o = 0;
                        for (; o + ROWS <= some; o += ROWS)
                            product<ROWS>(a + o, 1, some, b, inputs, into + o * COLUMNS, COLUMNS, count, added);
                        for (; o + 4 <= some; o += 4)
                            product<4>(a + o, 1, some, b, inputs, into + o * COLUMNS, COLUMNS, count, added);
                        for (; o < some; o += 2)
                            product<2>(a + o, 1, some, b, inputs, into + o * COLUMNS, COLUMNS, count, added);
                    }
                }
            }
        }
#pragma omp for schedule(static)
        for (long o = 0; o < outputs; o++)
            for (long c = 0; c < inputs; c += LANES) {
                Floats half[6][3], line[6], out[3];
                for (long i = 0; i < 6; i++) {
                    for (long j = 0; j < 6; j++) {
                        const long panel = (i * 6 + j) * inputs + c / COLUMNS * COLUMNS;
                        const float *sum = sums + panel * outputs + o * COLUMNS + c % COLUMNS;
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
