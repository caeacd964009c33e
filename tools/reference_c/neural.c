/* token_causal and cross_layer. Names follow README.md; matrices are stored with one row per input. */
#include "internal.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { FEATURES = 32, AVERAGES = 2, MOST_HEADS = 1024, MOST_WINDOW = 1 << 16, MOST_WIDTH = 1 << 24 };
static const float RETAINED[AVERAGES] = {0.7f, 0.97f};

typedef struct { Size in, out; float *rows, *bias; } Map; /* rows (in, out); no bias: NULL */
typedef struct { float *weight, *bias; } Norm;
typedef struct {
    Norm before_attention, before_mlp;
    Map query_key_value, out, wider, narrower;
    float *bias; /* (heads, window) */
} Transformer;

typedef struct {
    Size heads;
    Map map;       /* to scaled queries, keys and gates */
    float *bias;   /* (heads, window) */
    float *same;   /* (heads, 2) */
    float *weight; /* (heads, L * E) */
} Copying;

typedef struct {
    Size width, depth, heads, window, known_tokens, ngrams, memory_tokens, prefixes;
    int64_t *known_rows, *ngram_rows, *memory_rows;
    float *known, *ngram_vectors, *memory_vectors, *previous; /* previous: (L * E, width) */
    Transformer *blocks;
    Norm norm;
    Map from_token, from_memory;
    int64_t *prefix_keys;    /* (prefixes) */
    int64_t *prefix_experts; /* (prefixes, L, K); E: none */
    float *prefix_weight;    /* (L) */
    float *from_history; /* (averages, L * E) */
    Copying copying;     /* no heads: 0 */
    /* cross_layer */
    Size ahead, layer_width, layer_heads;
    int has_layers, has_next;
    Map start, recurrent;
    float *routed;       /* (L, E, 3 * layer_width): input of the gates from an expert */
    float *input_bias;   /* (3 * layer_width) */
    float **from_expert; /* layer -> (E, later layers, E) */
    float *from_state;   /* (ahead, L, layer_width, E) */
    float *layer_map;    /* (L, layer_width, 2 * layer_heads * FEATURES + layer_heads) */
    float *gate_bias;    /* (L, layer_heads) */
    float *layer_bias;   /* (layer_heads, window) */
    float *layer_weight; /* (ahead, layer_heads, L, E) */
    /* the next run */
    float *first, *next_from_history, *next_from_expert, *next_from_state;
    Map next_from_token;
    Copying next_copying;
} Neural;

typedef struct {
    float *keys;   /* (width, window) */
    float *values; /* (window, width) */
} BlockState;

typedef struct {
    float *keys;       /* (heads * FEATURES, window - 1) */
    float *attention;  /* (heads, window - 1) */
    int64_t (*ids)[2]; /* (window - 1): ids of a token and of the token before it */
    int64_t last;      /* id of the last token */
} CopyState;

typedef struct {
    Size tokens;    /* tokens before the current one; -1: no token is started */
    int64_t parent; /* 1 + the row of the prefix that ends with the current token; 0: none yet; -1: it is unknown */
    BlockState *blocks;
    CopyState copying, next_copying;
    float *averages;     /* (averages, L * E) */
    int32_t *past;       /* (window - 1, L * K) as layer * E + expert; -1: none */
    int32_t *current;    /* (L * K) */
    float *features;     /* (width) */
    float *state;        /* (layer_width) */
    float *token_logits; /* (L, E) */
    float *layer_keys;   /* (L, layer_heads * FEATURES, window - 1) */
    float *next_logits;  /* (L, E): of all experts */
    float *next_bonus;   /* (L, E): added for experts that the current token uses */
    float *a, *b, *c, *scores; /* scratch */
} State;

static Size smaller(Size a, Size b)
{
    return a < b ? a : b;
}

/* Loading */

static float *transposed(Loader *loader, const float *values, int64_t rows, int64_t columns)
{
    float *out = keep(loader, rows * columns, sizeof *out);
    for (Size i = 0; i < rows; i++)
        for (Size j = 0; j < columns; j++)
            out[j * rows + i] = values[i * columns + j];
    return out;
}

static Map load_map(Loader *loader, Size in, Size out, int has_bias, const char *prefix, const char *name)
{
    Map map = {in, out, NULL, NULL};
    map.rows = transposed(loader, passing_floats(loader, SHAPE(out, in), "%s%s.weight", prefix, name), out, in);
    if (has_bias)
        map.bias = floats(loader, SHAPE(out), "%s%s.bias", prefix, name);
    return map;
}

static Norm load_norm(Loader *loader, Size width, const char *prefix, const char *name)
{
    Norm norm;
    norm.weight = floats(loader, SHAPE(width), "%s%s.weight", prefix, name);
    norm.bias = floats(loader, SHAPE(width), "%s%s.bias", prefix, name);
    return norm;
}

static Copying load_copying(Loader *loader, const char *prefix, Size width, Size heads, Size window, Size total)
{
    Copying copying = {.heads = heads};
    if (!heads)
        return copying;
    const char *parts[] = {"query", "key", "gate"};
    Size out = 2 * heads * FEATURES + heads;
    copying.map = (Map){width, out, keep(loader, width * out, sizeof(float)), NULL};
    copying.map.bias = keep(loader, out, sizeof(float));
    for (Size part = 0; part < 3; part++) {
        Size first = part * heads * FEATURES, size = part < 2 ? heads * FEATURES : heads;
        float scale = part ? 1 : 1 / sqrtf(FEATURES);
        const float *weight = passing_floats(loader, SHAPE(size, width), "%s%s.weight", prefix, parts[part]);
        const float *bias = passing_floats(loader, SHAPE(size), "%s%s.bias", prefix, parts[part]);
        for (Size j = 0; j < size; j++) {
            for (Size i = 0; i < width; i++)
                copying.map.rows[i * out + first + j] = scale * weight[j * width + i];
            copying.map.bias[first + j] = scale * bias[j];
        }
    }
    copying.bias = floats(loader, SHAPE(heads, window), "%sbias", prefix);
    copying.same = floats(loader, SHAPE(heads, 2), "%ssame", prefix);
    copying.weight = floats(loader, SHAPE(heads, total), "%sweight", prefix);
    return copying;
}

static void load_tokens(Loader *loader, Neural *n, Size total)
{
    int64_t vocab = loader->predictor->vocab_size;
    n->known = floats(loader, SHAPE(n->known_tokens + 1, n->width), "tokens.known.weight");
    n->known_rows = integers(loader, 0, n->known_tokens, SHAPE(vocab), "tokens.rows");
    int64_t buckets = integer(loader, loader->arguments, "ngram_buckets", 0, MOST_WIDTH);
    n->ngrams = buckets ? 16 : 0;
    n->ngram_rows = integers(loader, 0, buckets, SHAPE(vocab, n->ngrams), "tokens.ngrams");
    if (buckets)
        n->ngram_vectors = floats(loader, SHAPE(buckets + 1, n->width), "tokens.ngram_embedding.weight");
    if (n->prefixes) {
        const mb_predictor *p = loader->predictor;
        n->prefix_keys = integers(loader, 0, INT64_MAX, SHAPE(n->prefixes), "prefixes.keys");
        n->prefix_experts =
            integers(loader, 0, p->experts, SHAPE(n->prefixes, p->layers, p->top_k), "prefixes.experts");
        n->prefix_weight = floats(loader, SHAPE(p->layers), "prefixes.weight");
        for (Size row = 0; row < n->prefixes; row++) {
            int64_t key = n->prefix_keys[row], before = row ? n->prefix_keys[row - 1] : -1;
            if (key != INT64_MAX && (key <= before || key / vocab > row))
                fail(loader, "prefixes.keys are not those of a trie");
        }
    }
    if (!n->memory_tokens)
        return;
    n->memory_rows = integers(loader, 0, n->memory_tokens, SHAPE(vocab), "memory.rows");
    n->memory_vectors = floats(loader, SHAPE(n->memory_tokens + 1, n->width), "memory.vectors");
    n->from_memory = load_map(loader, n->width, total, 0, "", "from_memory");
}

static void load_layers(Loader *loader, Neural *n)
{
    const mb_predictor *p = loader->predictor;
    Size layers = p->layers, experts = p->experts, total = layers * experts, width = n->layer_width, gates = 3 * width;
    n->start = load_map(loader, n->width, width, 1, "", "start");
    const float *routed = passing_floats(loader, SHAPE(layers, experts, width), "routed");
    const float *inputs = passing_floats(loader, SHAPE(gates, width), "recurrent.weight_ih_l0");
    n->input_bias = floats(loader, SHAPE(gates), "recurrent.bias_ih_l0");
    n->recurrent = (Map){width, gates, NULL, floats(loader, SHAPE(gates), "recurrent.bias_hh_l0")};
    const float *hidden = passing_floats(loader, SHAPE(gates, width), "recurrent.weight_hh_l0");
    n->recurrent.rows = transposed(loader, hidden, gates, width);
    n->routed = keep(loader, total * gates, sizeof(float));
    for (Size expert = 0; expert < total; expert++)
        for (Size gate = 0; gate < gates; gate++)
            for (Size i = 0; i < width; i++)
                n->routed[expert * gates + gate] += routed[expert * width + i] * inputs[gate * width + i];
    n->from_state = floats(loader, SHAPE(n->ahead, layers, width, experts), "from_state");
    const float *pairs = passing_floats(loader, SHAPE(layers * (layers - 1) / 2, experts, experts), "from_expert");
    n->from_expert = keep(loader, layers, sizeof(float *));
    Size square = experts * experts;
    for (Size layer = 0; layer < layers; layer++) { /* pairs are ordered by source, then by target */
        Size later = layers - 1 - layer;
        n->from_expert[layer] = keep(loader, later * square, sizeof(float));
        for (Size target = 0; target < later; target++, pairs += square)
            for (Size source = 0; source < experts; source++)
                memcpy(n->from_expert[layer] + (source * later + target) * experts, pairs + source * experts,
                       experts * sizeof(float));
    }
    Size heads = n->layer_heads, out = 2 * heads * FEATURES + heads;
    if (heads) {
        const float *parts[] = {passing_floats(loader, SHAPE(layers, width, heads * FEATURES), "layer_copying.query"),
                                passing_floats(loader, SHAPE(layers, width, heads * FEATURES), "layer_copying.key"),
                                passing_floats(loader, SHAPE(layers, width, heads), "layer_copying.gate")};
        n->layer_map = keep(loader, layers * width * out, sizeof(float));
        for (Size part = 0; part < 3; part++) {
            Size first = part * heads * FEATURES, size = part < 2 ? heads * FEATURES : heads;
            float scale = part ? 1 : 1 / sqrtf(FEATURES);
            for (Size row = 0; row < layers * width; row++)
                for (Size j = 0; j < size; j++)
                    n->layer_map[row * out + first + j] = scale * parts[part][row * size + j];
        }
        n->gate_bias = floats(loader, SHAPE(layers, heads), "layer_copying.gate_bias");
        n->layer_bias = floats(loader, SHAPE(heads, n->window), "layer_copying.bias");
        n->layer_weight = floats(loader, SHAPE(n->ahead, heads, layers, experts), "layer_copying.weight");
    }
    if (!n->has_next)
        return;
    n->first = floats(loader, SHAPE(layers, experts), "following.first");
    n->next_from_token = load_map(loader, n->width, total, 1, "following.", "from_token");
    n->next_from_history = floats(loader, SHAPE(AVERAGES, total), "following.from_history");
    n->next_from_expert = floats(loader, SHAPE(layers, experts, experts), "following.from_expert");
    n->next_from_state = floats(loader, SHAPE(layers, width, experts), "following.from_state");
    n->next_copying = load_copying(loader, "following.copying.", n->width, n->copying.heads, n->window, total);
}

static const Architecture NEURAL;

void load_neural(Loader *loader, int has_layers)
{
    mb_predictor *p = loader->predictor;
    const Json *arguments = loader->arguments;
    Neural *n = keep(loader, 1, sizeof *n);
    Size total = p->layers * p->experts, width;
    p->architecture = &NEURAL;
    p->weights = n;
    n->width = width = integer(loader, arguments, "width", 1, MOST_WIDTH);
    n->depth = integer(loader, arguments, "depth", 1, 1024);
    n->heads = integer(loader, arguments, "heads", 1, MOST_HEADS);
    n->window = integer(loader, arguments, "window", 1, MOST_WINDOW);
    Size copy_heads = integer(loader, arguments, "copy_heads", 0, MOST_HEADS);
    n->known_tokens = smaller(integer(loader, arguments, "known_tokens", 0, MOST_WIDTH), p->vocab_size);
    n->memory_tokens = smaller(integer(loader, arguments, "memory_tokens", 0, MOST_WIDTH), p->vocab_size);
    n->prefixes = integer(loader, arguments, "memory_prefixes", 0, MOST_WIDTH);
    p->lookaheads = 1;
    if (has_layers) {
        n->has_layers = 1;
        n->ahead = integer(loader, arguments, "lookaheads", 1, 10000);
        n->layer_width = integer(loader, arguments, "layer_width", 1, MOST_WIDTH);
        n->layer_heads = integer(loader, arguments, "layer_copy_heads", 0, MOST_HEADS);
        const Json *next = member(arguments, "next_token_head");
        n->has_next = next && next->kind == JSON_TRUE;
        p->lookaheads = n->ahead + n->has_next;
    }
    if (width % n->heads || (n->window < 2 && (copy_heads || n->layer_heads)))
        fail(loader, "config.json: heads do not divide width, or window is too small");
    load_tokens(loader, n, total);
    n->previous = transposed(loader, passing_floats(loader, SHAPE(width, total), "previous.weight"), width, total);
    n->blocks = keep(loader, n->depth, sizeof *n->blocks);
    for (Size i = 0; i < n->depth; i++) {
        char block[32];
        snprintf(block, sizeof block, "blocks.%d.", (int)i);
        Transformer *weights = &n->blocks[i];
        weights->before_attention = load_norm(loader, width, block, "before_attention");
        weights->before_mlp = load_norm(loader, width, block, "before_mlp");
        weights->query_key_value = load_map(loader, width, 3 * width, 1, block, "query_key_value");
        weights->out = load_map(loader, width, width, 1, block, "out");
        weights->wider = load_map(loader, width, 4 * width, 1, block, "mlp.0");
        weights->narrower = load_map(loader, 4 * width, width, 1, block, "mlp.2");
        weights->bias = floats(loader, SHAPE(n->heads, n->window), "%sbias", block);
    }
    n->norm = load_norm(loader, width, "", "norm");
    n->from_token = load_map(loader, width, total, 1, "", "from_token");
    n->from_history = floats(loader, SHAPE(AVERAGES, total), "from_history");
    n->copying = load_copying(loader, "copying.", width, copy_heads, n->window, total);
    if (has_layers)
        load_layers(loader, n);
}

/* Arithmetic */

static void add_scaled(float *restrict out, const float *restrict x, float scale, Size count)
{
    for (Size i = 0; i < count; i++)
        out[i] += scale * x[i];
}

/* out[j] += the sum over i of x[i] * rows[i * stride + j]; four rows at a time, which reads and writes `out` less. */
static void add_rows(float *restrict out, Size width, const float *restrict rows, Size stride, const float *restrict x,
                     Size count)
{
    Size whole = count - count % 4;
    for (Size i = 0; i < whole; i += 4) {
        const float *restrict r0 = rows + i * stride, *restrict r1 = r0 + stride;
        const float *restrict r2 = r1 + stride, *restrict r3 = r2 + stride;
        float x0 = x[i], x1 = x[i + 1], x2 = x[i + 2], x3 = x[i + 3];
        for (Size j = 0; j < width; j++)
            out[j] += x0 * r0[j] + x1 * r1[j] + x2 * r2[j] + x3 * r3[j];
    }
    for (Size i = whole; i < count; i++)
        add_scaled(out, rows + i * stride, x[i], width);
}

static void apply(float *out, const Map *map, const float *x)
{
    if (map->bias)
        memcpy(out, map->bias, map->out * sizeof *out);
    else
        memset(out, 0, map->out * sizeof *out);
    add_rows(out, map->out, map->rows, map->out, x, map->in);
}

static void normalize(float *out, const Norm *norm, const float *x, Size width)
{
    double mean = 0, variance = 0;
    for (Size i = 0; i < width; i++)
        mean += x[i];
    mean /= (double)width;
    for (Size i = 0; i < width; i++)
        variance += (x[i] - mean) * (x[i] - mean);
    double scale = 1 / sqrt(variance / (double)width + 1e-5);
    for (Size i = 0; i < width; i++)
        out[i] = (float)((x[i] - mean) * scale) * norm->weight[i] + norm->bias[i];
}

static float sigmoid(float x)
{
    return 1 / (1 + expf(-x));
}

/* The softmax of x, times a factor. */
static void softmax(float *x, Size count, float factor)
{
    float highest = -INFINITY, total = 0;
    for (Size i = 0; i < count; i++)
        highest = fmaxf(highest, x[i]);
    for (Size i = 0; i < count; i++)
        total += x[i] = expf(x[i] - highest);
    for (Size i = 0; i < count; i++)
        x[i] *= factor / total;
}

/* Stepping. Token s is in place s % size of a ring. */

static void step_block(const Neural *n, const Transformer *weights, BlockState *block, State *s)
{
    Size width = n->width, size = width / n->heads, place = (s->tokens % n->window);
    Size visible = smaller(s->tokens + 1, n->window);
    float *query_key_value = s->b, *mixed = s->a, *out = s->c;
    normalize(s->a, &weights->before_attention, s->features, width);
    apply(query_key_value, &weights->query_key_value, s->a);
    for (Size i = 0; i < width; i++) {
        block->keys[i * n->window + place] = query_key_value[width + i];
        query_key_value[i] /= sqrtf((float)size);
    }
    memcpy(block->values + place * width, query_key_value + 2 * width, width * sizeof(float));
    memset(mixed, 0, width * sizeof(float));
    for (Size head = 0; head < n->heads; head++) {
        const float *bias = weights->bias + head * n->window;
        for (Size i = 0; i < visible; i++)
            s->scores[i] = bias[i <= place ? place - i : place - i + n->window];
        const float *keys = block->keys + head * size * n->window;
        add_rows(s->scores, visible, keys, n->window, query_key_value + head * size, size);
        softmax(s->scores, visible, 1);
        add_rows(mixed + head * size, size, block->values + head * size, width, s->scores, visible);
    }
    apply(out, &weights->out, mixed);
    add_scaled(s->features, out, 1, width);
    normalize(s->a, &weights->before_mlp, s->features, width);
    apply(s->b, &weights->wider, s->a);
    for (Size i = 0; i < 4 * width; i++)
        s->b[i] = 0.5f * s->b[i] * (1 + erff(s->b[i] * 0.70710678f));
    apply(out, &weights->narrower, s->b);
    add_scaled(s->features, out, 1, width);
}

/* Attend to the tokens before: attention (window - 1) by place. Then store the current token's keys. */
static void attend(const State *s, Size window, Size heads, float *keys, const float *mapped, const float *bias,
                   const float *same, int64_t (*ids)[2], const int64_t *id, const float *gate_bias, float *attention)
{
    Size size = window - 1, visible = smaller(s->tokens, size), newest = (s->tokens + size - 1) % size;
    for (Size head = 0; head < heads; head++) {
        float *row = attention + head * size;
        for (Size i = 0; i < visible; i++) {
            row[i] = bias[head * window + (i <= newest ? newest - i + 1 : newest - i + size + 1)];
            if (same && ids[i][0] == id[0])
                row[i] += same[2 * head] + (ids[i][1] == id[1] ? same[2 * head + 1] : 0);
        }
        const float *head_keys = keys + head * FEATURES * size;
        add_rows(row, visible, head_keys, size, mapped + head * FEATURES, FEATURES);
        float gate = mapped[2 * heads * FEATURES + head] + (gate_bias ? gate_bias[head] : 0);
        softmax(row, visible, sigmoid(gate));
    }
    for (Size i = 0; i < heads * FEATURES; i++)
        keys[i * size + s->tokens % size] = mapped[heads * FEATURES + i];
}

static void start_copying(const Neural *n, const Copying *copying, CopyState *state, State *s, int64_t token_id)
{
    int64_t id[2] = {token_id, s->tokens ? state->last : -1};
    apply(s->a, &copying->map, s->features);
    attend(s, n->window, copying->heads, state->keys, s->a, copying->bias, copying->same, state->ids, id, NULL,
           state->attention);
    memcpy(state->ids[s->tokens % (n->window - 1)], id, sizeof id);
    state->last = token_id;
}

/* Add attention times the weights of the experts of earlier tokens: of the attended ones, or of their successors. */
static void copy_experts(const mb_predictor *p, const Neural *n, const Copying *copying, const CopyState *state,
                         const State *s, int successors, float *logits)
{
    Size size = n->window - 1, visible = smaller(s->tokens, size), newest = (s->tokens + size - 1) % size;
    Size entries = p->layers * p->top_k, total = p->layers * p->experts;
    for (Size head = 0; head < copying->heads; head++)
        for (Size i = 0; i < visible; i++) {
            if (successors && i == newest)
                continue; /* its successor is the current token */
            const int32_t *experts = s->past + ((i + successors) % size) * entries;
            const float *weight = copying->weight + head * total;
            float share = state->attention[head * size + i];
            for (Size j = 0; j < entries; j++)
                if (experts[j] >= 0)
                    logits[experts[j]] += share * weight[experts[j]];
        }
}

static void embed(const Neural *n, State *s, int64_t token_id)
{
    Size width = n->width, count = 0;
    memcpy(s->features, n->known + n->known_rows[token_id] * width, width * sizeof(float));
    for (Size i = 0; i < n->ngrams; i++)
        count += n->ngram_rows[token_id * n->ngrams + i] != 0; /* 0: none */
    for (Size i = 0; i < n->ngrams; i++) {
        int64_t row = n->ngram_rows[token_id * n->ngrams + i];
        if (row)
            add_scaled(s->features, n->ngram_vectors + row * width, 1 / (float)count, width);
    }
}

/* Add the weights of the experts of the prefix that ends with the current token, if it is known. */
static void add_prefix(const mb_predictor *p, const Neural *n, State *s, int64_t token_id, float *logits)
{
    if (s->parent < 0)
        return;
    Size row = find_id(n->prefix_keys, n->prefixes, s->parent * p->vocab_size + token_id);
    s->parent = row < 0 ? -1 : row + 1;
    for (Size layer = 0; row >= 0 && layer < p->layers; layer++)
        for (Size i = 0; i < p->top_k; i++) {
            int64_t expert = n->prefix_experts[(row * p->layers + layer) * p->top_k + i];
            if (expert < p->experts)
                logits[layer * p->experts + expert] += n->prefix_weight[layer];
        }
}

static void score_layers(mb_stepper *stepper, const Neural *n, State *s, Size routed);

static void start_token(mb_stepper *stepper, int64_t token_id)
{
    const mb_predictor *p = stepper->predictor;
    const Neural *n = p->weights;
    State *s = stepper->state;
    Size width = n->width, total = p->layers * p->experts, entries = p->layers * p->top_k;
    embed(n, s, token_id);
    for (int i = 0; i < AVERAGES; i++)
        for (Size j = 0; j < total; j++)
            s->averages[i * total + j] *= RETAINED[i];
    if (s->tokens >= 0) { /* the last token becomes an earlier one */
        for (Size i = 0; i < entries; i++) {
            int32_t expert = s->current[i];
            if (expert < 0)
                continue;
            add_scaled(s->features, n->previous + expert * width, 1, width);
            for (Size j = 0; j < AVERAGES; j++)
                s->averages[j * total + expert] += 1 - RETAINED[j];
        }
        if (n->window > 1)
            memcpy(s->past + s->tokens % (n->window - 1) * entries, s->current, entries * sizeof *s->current);
    }
    s->tokens++;
    for (Size i = 0; i < entries; i++)
        s->current[i] = -1;
    const float *memory = n->memory_tokens ? n->memory_vectors + n->memory_rows[token_id] * width : NULL;
    if (memory)
        add_scaled(s->features, memory, 1, width);
    for (Size i = 0; i < n->depth; i++)
        step_block(n, &n->blocks[i], &s->blocks[i], s);
    normalize(s->a, &n->norm, s->features, width);
    memcpy(s->features, s->a, width * sizeof(float));
    float *logits = s->token_logits;
    apply(logits, &n->from_token, s->features);
    for (int i = 0; i < AVERAGES; i++)
        for (Size j = 0; j < total; j++)
            logits[j] += s->averages[i * total + j] * n->from_history[i * total + j];
    if (memory)
        add_rows(logits, total, n->from_memory.rows, total, memory, width);
    if (n->copying.heads) {
        start_copying(n, &n->copying, &s->copying, s, token_id);
        copy_experts(p, n, &n->copying, &s->copying, s, 0, logits);
    }
    add_prefix(p, n, s, token_id, logits);
    if (!n->has_layers) {
        for (Size layer = 0; layer < p->layers; layer++)
            set_scores(stepper, layer, 0, logits + layer * p->experts);
        return;
    }
    if (n->has_next) {
        apply(s->next_logits, &n->next_from_token, s->features);
        for (Size j = 0; j < total; j++) {
            s->next_bonus[j] = 0;
            for (int i = 0; i < AVERAGES; i++) {
                s->next_logits[j] += s->averages[i * total + j] * RETAINED[i] * n->next_from_history[i * total + j];
                s->next_bonus[j] += (1 - RETAINED[i]) * n->next_from_history[i * total + j];
            }
        }
        if (n->next_copying.heads) {
            Size size = n->window - 1, newest = (s->tokens + size - 1) % size;
            start_copying(n, &n->next_copying, &s->next_copying, s, token_id);
            copy_experts(p, n, &n->next_copying, &s->next_copying, s, 1, s->next_logits);
            for (Size head = 0; s->tokens && head < n->next_copying.heads; head++)
                add_scaled(s->next_bonus, n->next_copying.weight + head * total,
                           s->next_copying.attention[head * size + newest], total);
        }
        for (Size layer = 0; !s->tokens && layer < p->layers; layer++)
            set_scores(stepper, layer, n->ahead, n->first + layer * p->experts);
    }
    apply(s->state, &n->start, s->features);
    for (Size i = 0; i < n->layer_width; i++)
        s->state[i] = tanhf(s->state[i]);
    score_layers(stepper, n, s, 0);
}

/* Score the layers within reach once a number of layers is routed. */
static void score_layers(mb_stepper *stepper, const Neural *n, State *s, Size routed)
{
    const mb_predictor *p = stepper->predictor;
    Size experts = p->experts, heads = n->layer_heads, reached = smaller(n->ahead, p->layers - routed);
    if (reached <= 0)
        return;
    float *logits = stepper->logits;
    memcpy(logits, s->token_logits + routed * experts, reached * experts * sizeof(float));
    for (Size i = 0; i < reached; i++) {
        Size place = i * p->layers + routed + i;
        const float *rows = n->from_state + place * n->layer_width * experts;
        add_rows(logits + i * experts, experts, rows, experts, s->state, n->layer_width);
    }
    if (heads) {
        Size size = n->window - 1, visible = smaller(s->tokens, size), out = 2 * heads * FEATURES + heads;
        float *keys = s->layer_keys + routed * heads * FEATURES * size;
        const float *rows = n->layer_map + routed * n->layer_width * out;
        memset(s->a, 0, out * sizeof(float));
        add_rows(s->a, out, rows, out, s->state, n->layer_width);
        attend(s, n->window, heads, keys, s->a, n->layer_bias, NULL, NULL, NULL, n->gate_bias + routed * heads, s->b);
        for (Size i = 0; i < visible; i++) {
            const int32_t *past = s->past + (i * p->layers + routed) * p->top_k;
            for (Size head = 0; head < heads; head++) {
                float share = s->b[head * size + i];
                for (Size j = 0; j < reached * p->top_k; j++) {
                    Size row = (j / p->top_k) * heads + head;
                    const float *weight = n->layer_weight + row * p->layers * experts;
                    if (past[j] >= 0)
                        logits[past[j] - routed * experts] += share * weight[past[j]];
                }
            }
        }
    }
    for (Size i = 0; i < reached; i++)
        set_scores(stepper, routed + i, i, logits + i * experts);
}

static void step_recurrent(const Neural *n, State *s, const float *routed, const int32_t *experts, Size count)
{
    Size width = n->layer_width;
    float *from_inputs = s->a, *from_state = s->b;
    memcpy(from_inputs, n->input_bias, 3 * width * sizeof(float));
    for (Size i = 0; i < count; i++)
        add_scaled(from_inputs, routed + experts[i] * 3 * width, 1, 3 * width);
    apply(from_state, &n->recurrent, s->state);
    for (Size i = 0; i < width; i++) {
        float reset = sigmoid(from_inputs[i] + from_state[i]);
        float update = sigmoid(from_inputs[width + i] + from_state[width + i]);
        float candidate = tanhf(from_inputs[2 * width + i] + reset * from_state[2 * width + i]);
        s->state[i] = candidate + update * (s->state[i] - candidate);
    }
}

static void route(mb_stepper *stepper, Size layer, const int32_t *chosen, Size count)
{
    const mb_predictor *p = stepper->predictor;
    const Neural *n = p->weights;
    State *s = stepper->state;
    Size experts = p->experts, later = p->layers - 1 - layer;
    for (Size i = 0; i < count; i++)
        s->current[layer * p->top_k + i] = (int32_t)(layer * experts + chosen[i]);
    if (!n->has_layers)
        return;
    step_recurrent(n, s, n->routed + layer * experts * 3 * n->layer_width, chosen, count);
    for (Size i = 0; i < count; i++)
        add_scaled(s->token_logits + (layer + 1) * experts, n->from_expert[layer] + chosen[i] * later * experts, 1,
                   later * experts);
    score_layers(stepper, n, s, layer + 1);
    if (!n->has_next)
        return;
    float *logits = stepper->logits;
    memcpy(logits, s->next_logits + layer * experts, experts * sizeof(float));
    for (Size i = 0; i < count; i++) {
        Size row = layer * experts + chosen[i];
        add_scaled(logits, n->next_from_expert + row * experts, 1, experts);
        logits[chosen[i]] += s->next_bonus[row];
    }
    const float *rows = n->next_from_state + layer * n->layer_width * experts;
    add_rows(logits, experts, rows, experts, s->state, n->layer_width);
    set_scores(stepper, layer, n->ahead, logits);
}

static void make_copy_state(Arena *arena, const Neural *n, const Copying *copying, CopyState *state)
{
    state->keys = arena_take(arena, copying->heads * FEATURES * (n->window - 1), sizeof(float));
    state->attention = arena_take(arena, copying->heads * (n->window - 1), sizeof(float));
    state->ids = arena_take(arena, n->window - 1, sizeof *state->ids);
}

static void make_state(mb_stepper *stepper)
{
    const mb_predictor *p = stepper->predictor;
    const Neural *n = p->weights;
    Arena *arena = &stepper->arena;
    State *s = stepper->state = arena_take(arena, 1, sizeof *s);
    if (!s)
        return;
    Size total = p->layers * p->experts, entries = p->layers * p->top_k, window = n->window;
    Size heads = n->copying.heads > n->layer_heads ? n->copying.heads : n->layer_heads, scratch = 4 * n->width;
    Size others[] = {3 * n->layer_width, (2 * FEATURES + 1) * heads, n->layer_heads * (window - 1)};
    for (int i = 0; i < 3; i++)
        scratch = others[i] > scratch ? others[i] : scratch;
    s->blocks = arena_take(arena, n->depth, sizeof *s->blocks);
    for (Size i = 0; s->blocks && i < n->depth; i++) {
        s->blocks[i].keys = arena_take(arena, n->width * window, sizeof(float));
        s->blocks[i].values = arena_take(arena, window * n->width, sizeof(float));
    }
    make_copy_state(arena, n, &n->copying, &s->copying);
    make_copy_state(arena, n, &n->next_copying, &s->next_copying);
    s->averages = arena_take(arena, AVERAGES * total, sizeof(float));
    s->past = arena_take(arena, (window - 1) * entries, sizeof(int32_t));
    s->current = arena_take(arena, entries, sizeof(int32_t));
    s->features = arena_take(arena, n->width, sizeof(float));
    s->state = arena_take(arena, n->layer_width, sizeof(float));
    s->token_logits = arena_take(arena, total, sizeof(float));
    s->layer_keys = arena_take(arena, p->layers * n->layer_heads * FEATURES * (window - 1), sizeof(float));
    s->next_logits = arena_take(arena, total, sizeof(float));
    s->next_bonus = arena_take(arena, total, sizeof(float));
    s->a = arena_take(arena, scratch, sizeof(float));
    s->b = arena_take(arena, scratch, sizeof(float));
    s->c = arena_take(arena, scratch, sizeof(float));
    s->scores = arena_take(arena, window, sizeof(float));
}

static void reset(mb_stepper *stepper)
{
    const mb_predictor *p = stepper->predictor;
    State *s = stepper->state;
    s->tokens = -1;
    s->parent = 0;
    memset(s->averages, 0, AVERAGES * p->layers * p->experts * sizeof(float));
}

static const Architecture NEURAL = {make_state, reset, start_token, route};
