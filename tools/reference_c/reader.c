/* Reading of predictor folders: JSON and safetensors. Every size is checked before it is used. */
#include "internal.h"

#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DEEPEST = 64, MOST_DIMENSIONS = 8, LONGEST_NAME = 128 };
static const size_t LARGEST_JSON = (size_t)1 << 26;

struct Block {
    Block *next;
    max_align_t data[];
};

void *arena_take(Arena *arena, size_t count, size_t size)
{
    Block *block = NULL;
    if (!count || size <= (SIZE_MAX - sizeof(Block)) / count)
        block = calloc(1, sizeof(Block) + count * size);
    if (!block) {
        arena->failed = 1;
        return NULL;
    }
    block->next = arena->blocks;
    arena->blocks = block;
    return block->data;
}

void arena_free(Arena *arena)
{
    for (Block *block = arena->blocks; block;) {
        Block *next = block->next;
        free(block);
        block = next;
    }
    arena->blocks = NULL;
}

void fail(Loader *loader, const char *format, ...)
{
    char reason[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(reason, sizeof reason, format, arguments);
    va_end(arguments);
    if (loader->error_size) {
        snprintf(loader->error, loader->error_size, "%s: %s", loader->folder, reason);
        for (char *c = loader->error; *c; c++) /* names in files may hold what a terminal obeys */
            if ((unsigned char)*c < ' ' || *c == 127)
                *c = '?';
    }
    longjmp(loader->jump, 1);
}

static void *taken(Loader *loader, Arena *arena, size_t count, size_t size)
{
    void *memory = arena_take(arena, count, size);
    if (!memory)
        fail(loader, "not enough memory");
    return memory;
}

void *keep(Loader *loader, size_t count, size_t size)
{
    return taken(loader, &loader->predictor->arena, count, size);
}

/* JSON */

typedef struct {
    Loader *loader;
    const char *file;
    const char *at, *stop;
    int depth;
} Parser;

static _Noreturn void damaged(Parser *parser)
{
    fail(parser->loader, "%s is not valid JSON", parser->file);
}

static char peek(Parser *parser)
{
    while (parser->at < parser->stop && strchr(" \t\r\n", *parser->at) && *parser->at)
        parser->at++;
    return parser->at < parser->stop ? *parser->at : '\0';
}

static int skip(Parser *parser, char c)
{
    if (peek(parser) != c || parser->at == parser->stop)
        return 0;
    parser->at++;
    return 1;
}

static void expect(Parser *parser, const char *word)
{
    size_t length = strlen(word);
    if ((size_t)(parser->stop - parser->at) < length || memcmp(parser->at, word, length))
        damaged(parser);
    parser->at += length;
}

static int digit(const Parser *parser)
{
    return parser->at < parser->stop && *parser->at >= '0' && *parser->at <= '9';
}

/* Not strtod, which reads the decimal point of the program's language. */
static double parse_number(Parser *parser)
{
    double value = 0;
    int exponent = 0, sign = *parser->at == '-' ? (parser->at++, -1) : 1;
    if (!digit(parser))
        damaged(parser);
    for (; digit(parser); parser->at++)
        value = 10 * value + (*parser->at - '0');
    if (parser->at < parser->stop && *parser->at == '.') {
        parser->at++;
        if (!digit(parser))
            damaged(parser);
        for (; digit(parser); parser->at++, exponent -= exponent > -9999)
            value = 10 * value + (*parser->at - '0');
    }
    if (parser->at < parser->stop && (*parser->at == 'e' || *parser->at == 'E')) {
        int given = 0, down = 0;
        parser->at++;
        if (parser->at < parser->stop && (*parser->at == '-' || *parser->at == '+'))
            down = *parser->at++ == '-';
        if (!digit(parser))
            damaged(parser);
        for (; digit(parser); parser->at++)
            given = given < 9999 ? 10 * given + (*parser->at - '0') : given;
        exponent += down ? -given : given;
    }
    return sign * (exponent < 0 ? value / pow(10, -exponent) : value * pow(10, exponent));
}

static unsigned parse_code(Parser *parser)
{
    unsigned code = 0;
    for (int i = 0; i < 4; i++) {
        const char *digits = "0123456789abcdefABCDEF";
        const char *found = parser->at < parser->stop && *parser->at ? strchr(digits, *parser->at) : NULL;
        if (!found)
            damaged(parser);
        code = 16 * code + (unsigned)(found - digits < 16 ? found - digits : found - digits - 6);
        parser->at++;
    }
    return code;
}

static const char *parse_string(Parser *parser)
{
    const char *start = ++parser->at;
    while (parser->at < parser->stop && *parser->at != '"')
        parser->at += *parser->at == '\\' ? 2 : 1;
    if (parser->at >= parser->stop)
        damaged(parser);
    const char *end = parser->at;
    char *text = taken(parser->loader, &parser->loader->scratch, (size_t)(end - start) + 1, 1), *out = text;
    for (parser->at = start; parser->at < end;) {
        char c = *parser->at++;
        if (c != '\\') {
            *out++ = c;
            continue;
        }
        const char *plain = "\"\\/", *escaped = "bfnrt", *found;
        c = *parser->at++;
        if (c && strchr(plain, c))
            *out++ = c;
        else if (c && (found = strchr(escaped, c)))
            *out++ = "\b\f\n\r\t"[found - escaped];
        else if (c == 'u') { /* an escape of six characters becomes at most three bytes of UTF-8 */
            unsigned code = parse_code(parser);
            if (code >= 0x800) {
                *out++ = (char)(0xe0 | code >> 12);
                *out++ = (char)(0x80 | (code >> 6 & 0x3f));
                *out++ = (char)(0x80 | (code & 0x3f));
            } else if (code >= 0x80) {
                *out++ = (char)(0xc0 | code >> 6);
                *out++ = (char)(0x80 | (code & 0x3f));
            } else
                *out++ = (char)code;
        } else
            damaged(parser);
    }
    parser->at = end + 1;
    return text;
}

static Json *parse_value(Parser *parser)
{
    Json *value = taken(parser->loader, &parser->loader->scratch, 1, sizeof *value);
    if (++parser->depth > DEEPEST)
        damaged(parser);
    char c = peek(parser);
    if (c == '"') {
        value->kind = JSON_STRING;
        value->text = parse_string(parser);
    } else if (c == '{' || c == '[') {
        char close = c == '{' ? '}' : ']';
        Json **last = &value->child;
        value->kind = c == '{' ? JSON_OBJECT : JSON_LIST;
        parser->at++;
        while (!skip(parser, close)) {
            const char *name = NULL;
            if (value->child && !skip(parser, ','))
                damaged(parser);
            if (c == '{') {
                if (peek(parser) != '"')
                    damaged(parser);
                name = parse_string(parser);
                if (!skip(parser, ':'))
                    damaged(parser);
            }
            *last = parse_value(parser);
            (*last)->name = name;
            last = &(*last)->next;
        }
    } else if (c == 't') {
        value->kind = JSON_TRUE;
        expect(parser, "true");
    } else if (c == 'f') {
        value->kind = JSON_FALSE;
        expect(parser, "false");
    } else if (c == 'n') {
        expect(parser, "null");
    } else if (c == '-' || (c >= '0' && c <= '9')) {
        value->kind = JSON_NUMBER;
        value->number = parse_number(parser);
    } else
        damaged(parser);
    parser->depth--;
    return value;
}

static const Json *parse(Loader *loader, const unsigned char *text, size_t size, const char *file)
{
    Parser parser = {loader, file, (const char *)text, (const char *)text + size, 0};
    const Json *value = parse_value(&parser);
    if (peek(&parser) || parser.at != parser.stop || value->kind != JSON_OBJECT)
        damaged(&parser);
    return value;
}

const Json *member(const Json *object, const char *name)
{
    if (object && object->kind == JSON_OBJECT)
        for (const Json *each = object->child; each; each = each->next)
            if (!strcmp(each->name, name))
                return each;
    return NULL;
}

double number(Loader *loader, const Json *object, const char *name)
{
    const Json *value = member(object, name);
    if (!value || value->kind != JSON_NUMBER || !isfinite(value->number))
        fail(loader, "config.json has no number %s", name);
    return value->number;
}

int64_t integer(Loader *loader, const Json *object, const char *name, int64_t low, int64_t high)
{
    double value = number(loader, object, name);
    if (value != floor(value) || value < (double)low || value > (double)high)
        fail(loader, "config.json: %s is not a whole number of %lld to %lld", name, (long long)low, (long long)high);
    return (int64_t)value;
}

/* Files */

static unsigned char *read_file(Loader *loader, const char *name, size_t limit, size_t *size)
{
    size_t length = strlen(loader->folder) + strlen(name) + 2;
    char *path = taken(loader, &loader->scratch, length, 1);
    snprintf(path, length, "%s/%s", loader->folder, name);
    FILE *file = fopen(path, "rb");
    if (!file)
        fail(loader, "%s cannot be opened", name);
    unsigned char *content = NULL;
    long end = fseek(file, 0, SEEK_END) ? -1 : ftell(file);
    if (end >= 0 && (unsigned long)end <= limit && end < LONG_MAX && !fseek(file, 0, SEEK_SET)) {
        *size = (size_t)end;
        content = arena_take(&loader->scratch, *size + 1, 1);
        if (content && fread(content, 1, *size, file) != *size)
            content = NULL;
    }
    fclose(file);
    if (!content)
        fail(loader, "%s cannot be read, or is too large", name);
    return content;
}

static uint64_t little_endian(const unsigned char *bytes, int count)
{
    uint64_t value = 0;
    for (int i = count; i-- > 0;)
        value = value << 8 | bytes[i];
    return value;
}

void open_folder(Loader *loader)
{
    size_t size;
    const unsigned char *content = read_file(loader, "config.json", LARGEST_JSON, &size);
    loader->config = parse(loader, content, size, "config.json");
    if (integer(loader, loader->config, "format_version", 0, 1 << 20) != 1)
        fail(loader, "config.json has another format version than 1");
    loader->arguments = member(loader->config, "arguments");
    content = read_file(loader, "model.safetensors", SIZE_MAX / 2, &size);
    uint64_t header = size < 8 ? 0 : little_endian(content, 8);
    if (header < 2 || header > size - 8 || header > LARGEST_JSON)
        fail(loader, "model.safetensors has no header");
    loader->header = parse(loader, content + 8, (size_t)header, "the header of model.safetensors");
    loader->data = content + 8 + header;
    loader->data_size = size - 8 - (size_t)header;
}

/* Tensors */

static const struct { const char *name; int size, is_float; } DTYPES[] = {
    {"F64", 8, 1}, {"F32", 4, 1}, {"F16", 2, 1}, {"BF16", 2, 1},
    {"I64", 8, 0}, {"I32", 4, 0}, {"I16", 2, 0}, {"I8", 1, 0}, {"U8", 1, 0},
};
enum { F64, F32, F16, BF16, I64, I32, I16, I8, U8, UNKNOWN };

typedef struct {
    const unsigned char *data;
    int dtype, rank;
    int64_t shape[MOST_DIMENSIONS];
    size_t count;
} Tensor;

static size_t offset_of(const Json *value, size_t limit)
{
    int good = value && value->kind == JSON_NUMBER && value->number >= 0 && value->number <= (double)limit;
    return good && value->number == floor(value->number) ? (size_t)value->number : SIZE_MAX;
}

static Tensor find(Loader *loader, const char *name)
{
    const Json *entry = member(loader->header, name);
    if (!entry)
        fail(loader, "model.safetensors has no tensor %s", name);
    Tensor tensor = {.dtype = 0};
    const Json *dtype = member(entry, "dtype"), *shape = member(entry, "shape");
    const Json *offsets = member(entry, "data_offsets");
    while (tensor.dtype < UNKNOWN
           && (!dtype || dtype->kind != JSON_STRING || strcmp(dtype->text, DTYPES[tensor.dtype].name)))
        tensor.dtype++;
    if (tensor.dtype == UNKNOWN)
        fail(loader, "%s has an unknown type", name);
    const Json *first = offsets && offsets->kind == JSON_LIST ? offsets->child : NULL;
    size_t begin = offset_of(first, loader->data_size);
    size_t end = first ? offset_of(first->next, loader->data_size) : SIZE_MAX;
    if (begin == SIZE_MAX || end == SIZE_MAX || begin > end || !shape || shape->kind != JSON_LIST)
        fail(loader, "%s is damaged", name);
    size_t most = end - begin;
    tensor.count = 1;
    for (const Json *side = shape->child; side; side = side->next) {
        size_t length = offset_of(side, (size_t)1 << 40);
        if (length == SIZE_MAX || tensor.rank == MOST_DIMENSIONS || (length && tensor.count > SIZE_MAX / 8 / length))
            fail(loader, "%s has too large a shape", name);
        tensor.shape[tensor.rank++] = (int64_t)length;
        tensor.count *= length;
    }
    if (tensor.count * (size_t)DTYPES[tensor.dtype].size != most)
        fail(loader, "%s has a shape that is not that of its data", name);
    tensor.data = loader->data + begin;
    return tensor;
}

static Tensor find_shaped(Loader *loader, const char *name, int rank, const int64_t *shape, int is_float)
{
    Tensor tensor = find(loader, name);
    if (DTYPES[tensor.dtype].is_float != is_float)
        fail(loader, "%s has another kind of numbers than expected", name);
    int same = tensor.rank == rank;
    for (int i = 0; same && i < rank; i++)
        same = tensor.shape[i] == shape[i];
    if (!same)
        fail(loader, "%s has another shape than config.json implies", name);
    return tensor;
}

static float from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static float from_half(uint32_t half)
{
    uint32_t sign = (half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 0x3ff;
    if (exponent == 31)
        return from_bits(sign | 0x7f800000 | fraction << 13);
    if (exponent)
        return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
    return from_bits(sign | 0x3f800000) * (float)fraction / 16777216; /* 2^-24 */
}

static float *read_floats(Loader *loader, Arena *arena, int rank, const int64_t *shape, const char *format,
                          va_list arguments)
{
    char name[LONGEST_NAME];
    vsnprintf(name, sizeof name, format, arguments);
    Tensor tensor = find_shaped(loader, name, rank, shape, 1);
    int size = DTYPES[tensor.dtype].size;
    float *values = taken(loader, arena, tensor.count, sizeof *values);
    for (size_t i = 0; i < tensor.count; i++) {
        uint64_t bits = little_endian(tensor.data + i * (size_t)size, size);
        double wide;
        switch (tensor.dtype) {
        case F64: memcpy(&wide, &bits, sizeof wide), values[i] = (float)wide; break;
        case F32: values[i] = from_bits((uint32_t)bits); break;
        case F16: values[i] = from_half((uint32_t)bits); break;
        default: values[i] = from_bits((uint32_t)bits << 16);
        }
        if (!isfinite(values[i]))
            fail(loader, "%s is not finite", name);
    }
    return values;
}

float *floats(Loader *loader, int rank, const int64_t *shape, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    float *values = read_floats(loader, &loader->predictor->arena, rank, shape, format, arguments);
    va_end(arguments);
    return values;
}

float *passing_floats(Loader *loader, int rank, const int64_t *shape, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    float *values = read_floats(loader, &loader->scratch, rank, shape, format, arguments);
    va_end(arguments);
    return values;
}

int64_t *integers(Loader *loader, int64_t low, int64_t high, int rank, const int64_t *shape, const char *format, ...)
{
    char name[LONGEST_NAME];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(name, sizeof name, format, arguments);
    va_end(arguments);
    Tensor tensor = find_shaped(loader, name, rank, shape, 0);
    int size = DTYPES[tensor.dtype].size;
    int64_t *values = keep(loader, tensor.count, sizeof *values);
    for (size_t i = 0; i < tensor.count; i++) {
        uint64_t bits = little_endian(tensor.data + i * (size_t)size, size);
        uint64_t sign = tensor.dtype == U8 ? 0 : (uint64_t)1 << (8 * size - 1);
        values[i] = bits & sign ? -(int64_t)(sign - (bits & (sign - 1)) - 1) - 1 : (int64_t)bits;
        if (values[i] < low || values[i] > high)
            fail(loader, "%s has numbers out of range", name);
    }
    return values;
}

int64_t first_size(Loader *loader, const char *format, const char *prefix)
{
    char name[LONGEST_NAME];
    snprintf(name, sizeof name, format, prefix);
    Tensor tensor = find(loader, name);
    if (!tensor.rank)
        fail(loader, "%s has no dimension", name);
    return tensor.shape[0];
}
