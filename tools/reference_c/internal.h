/* Shared by the source files; users include moe_beyond.h. */
#ifndef MB_INTERNAL_H
#define MB_INTERNAL_H

#include "moe_beyond.h"

#include <setjmp.h>

/* Memory that is freed at once. */
typedef struct Block Block;
typedef struct {
    Block *blocks;
    int failed; /* whether memory was missing */
} Arena;

void *arena_take(Arena *arena, size_t count, size_t size); /* zeroed; NULL without memory */
void arena_free(Arena *arena);

typedef enum { JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_STRING, JSON_LIST, JSON_OBJECT } JsonKind;
typedef struct Json Json;
struct Json {
    JsonKind kind;
    double number;
    const char *text; /* of a string */
    const char *name; /* of a member of an object */
    Json *child;      /* first element or member */
    Json *next;       /* next element or member */
};

typedef ptrdiff_t Size; /* sizes and places: products of sizes need 64 bits */

typedef enum { SIGMOID, SOFTMAX, SUBSET } Activation;
typedef struct Architecture Architecture;

struct mb_predictor {
    Arena arena;
    const Architecture *architecture;
    void *weights;
    Size layers, experts, top_k, lookaheads; /* L, E, K, H; with the next run */
    int64_t vocab_size;
    int reads_token_ids;
    Activation activation;
    float *scale, *shift; /* calibration (H, L) */
};

struct mb_stepper {
    Arena arena;
    const mb_predictor *predictor;
    void *state;
    float *scores;  /* (L, E) */
    float *logits;  /* (L, E): logits of one call of set_scores */
    double *powers; /* (E): scratch of the activation */
    int64_t *seen;  /* (E): number of the call that last had the expert */
    int64_t calls;
    Size next_layer; /* L: a token comes next */
};

/* One implementation for architectures with the same weights. */
struct Architecture {
    void (*make_state)(mb_stepper *stepper); /* in the stepper's arena, which notes missing memory */
    void (*reset)(mb_stepper *stepper);
    void (*start_token)(mb_stepper *stepper, int64_t token_id);
    void (*route)(mb_stepper *stepper, Size layer, const int32_t *experts, Size count);
};

/* A predictor that is being read. Functions that take a loader return only if all is well. */
typedef struct {
    mb_predictor *predictor;
    Arena scratch; /* files and JSON */
    const char *folder;
    const Json *config, *arguments, *header;
    const unsigned char *data; /* of the tensors */
    size_t data_size;
    char *error;
    size_t error_size;
    jmp_buf jump;
} Loader;

_Noreturn void fail(Loader *loader, const char *format, ...);
void *keep(Loader *loader, size_t count, size_t size); /* zeroed memory of the predictor */
void open_folder(Loader *loader);
const Json *member(const Json *object, const char *name); /* NULL without one */
int64_t integer(Loader *loader, const Json *object, const char *name, int64_t low, int64_t high);
double number(Loader *loader, const Json *object, const char *name);

/* A shape as two arguments: the number of dimensions, and their sizes. */
#define SHAPE(...) (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), (const int64_t[]){__VA_ARGS__}
#define SCALAR 0, NULL

/* Read a tensor of exactly this shape; its name is a format. */
float *floats(Loader *loader, int rank, const int64_t *shape, const char *format, ...);
float *passing_floats(Loader *loader, int rank, const int64_t *shape, const char *format, ...); /* until all is read */
int64_t *integers(Loader *loader, int64_t low, int64_t high, int rank, const int64_t *shape, const char *format, ...);
int64_t first_size(Loader *loader, const char *format, const char *prefix); /* size of the first dimension */

/* Set the scores of a layer to the probabilities of its logits (E). */
void set_scores(mb_stepper *stepper, Size layer, Size lookahead, const float *logits);
Size find_id(const int64_t *sorted, Size count, int64_t id); /* place of an id in ascending ids; -1: absent */
void clear_scores(mb_stepper *stepper, Size layer); /* NaN */

void load_neural(Loader *loader, int has_layers);
void load_popularity(Loader *loader);
void load_history(Loader *loader);
void load_token_table(Loader *loader);
void load_naive_bayes(Loader *loader);

#endif
