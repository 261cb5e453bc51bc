/* answer.c: ask a model that `export.py RUN --port` wrote, with onnxruntime's C API, libc, libm.
   An app calls the functions of answer.h. This is also a program (export.py prints how to compile):

       ./answer FOLDER "Where is my card?"     the answer; its log-probability and speed on stderr
       ./answer FOLDER < questions.txt         an answer a line, newlines in answers written as \n
       ./answer FOLDER --choices "..."         the likeliest answer of the task's set
       ./answer FOLDER --check                 exit code 0 if this device computes as the export did

   How a question becomes an answer, and the part of this file that does it:

       Where is my card?
         |  2. characters   UTF-8, letters and numbers, Unicode's normal form C
         |  3. words        |Where| is| my| card|?|: no token crosses the end of a word
         |  4. tokens       bytes, of which pairs become one, again and again: 9576 314 957 3607 47
         |  5. the model    onnxruntime reads them within the chat template, keeps their keys and
         |                  values in the cache, and scores each token that may come next
         |  6. answers      the likeliest token is read in turn, until one ends the answer
       card_arrival */
#define _POSIX_C_SOURCE 200809L              /* for getline and clock_gettime */
#include "answer.h"
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if __has_include(<onnxruntime_c_api.h>)
#include <onnxruntime_c_api.h>
#else
#include <onnxruntime/onnxruntime_c_api.h>
#endif

/* answer.bin holds a head and these tables, little-endian, each at a multiple of 8 bytes; table.py
   writes it. TEXTS is bytes; up to FOLLOWING they are numbers of 32 bits; then rows of four. */
enum {
    TEXTS,       /* the texts of all tokens, of tasks and their answers, and of the check */
    STARTS,      /* where in TEXTS each text starts; it ends where the next one starts */
    BYTES,       /* the token of each of the 256 bytes, or NONE */
    PAGES,       /* which page of KINDS has the characters 256 i to 256 i + 255 */
    KINDS,       /* pages of 256 kinds of characters */
    BEFORE,      /* the chat template before a question: characters, and SPECIAL + special tokens */
    AFTER,       /* the same after a question */
    STOPS,       /* tokens that end an answer */
    PROMPT,      /* tokens of the check's question */
    FOLLOWING,   /* those that the model writes after them */
    MERGES,      /* left token, right token, rank, the token that they become; sorted */
    NAMES,       /* texts of tokens, a tree: node, character, next node, a token or NONE; sorted */
    ADDED,       /* the same of texts that are a token before all else, such as two line ends */
    PARTS,       /* a character, i, the i-th part of what it is composed of, 0; sorted */
    WHOLES,      /* two characters, the one that they compose, 0; sorted */
    LARGEST,     /* a token, 0, its score after PROMPT as a float, 0 */
    TASKS,       /* its name and instruction (numbers of texts), the first node of its answers or */
                 /*     NONE, the tokens of the longest one */
    CHOICES,     /* answers, a tree: node (its first row), token, next node, NONE; if that token */
                 /*     ends an answer: node, token, the number of its text, 0; sorted */
    DRAFTS,      /* a tree of tokens, the last one first: what mostly follows them, or NONE */
    TABLES };
enum { GPT2 = 1, LLAMA3 = 2 };               /* head->words; 0: a text is one word */
enum { SHARED = 1, CHARACTERS = 2, WHOLE_WORDS = 4, NORMAL_FORM = 8, DIGITS = 16, MARKS = 32,
       STRIP = 64 };                         /* bits of head->flags */
enum { LETTER = 1, NUMBER = 2, SPACE = 4, MARK = 8, DIGIT = 16, BLANK = 32 };      /* of a kind */
enum { CHUNK = 512, DRAFTED = 3, SHORT = 8 };  /* tokens of a step; guessed; of one with 4 scores */
enum { WINDOW = 1024, REPEATED = 8, SUFFIX = 4 };        /* tokens in which a guess is looked up */
typedef uint32_t u32; typedef union { struct { u32 second, first, a, b; }; uint64_t key; } Row;
typedef struct { OrtValue **past; size_t length; } Cache;    /* keys, values and states of tokens */
typedef struct { const char *name, *instruction; u32 node, longest; } Task;
static const u32 NONE = UINT32_MAX, SPECIAL = 1u << 31;
struct Head {
    char name[8]; u32 hash, model;           /* "answer.2"; CRC-32 of what follows, of the model */
    u32 vocab, context;                      /* tokens: known, to be read */
    u32 words, numbers, flags, question;     /* numbers: of a word, at most; the check's text */
    float tolerance; u32 unused;             /* of LARGEST, as a share of the largest score */
    struct { u32 at, count; } table[TABLES]; /* byte of the file; entries */
};
struct Block { struct Block *next; uint64_t is_past; };      /* memory, of a Cache or not */
struct Answer {
    jmp_buf back; char failure[1200];        /* where an error returns to, and what it is */
    char *folder, names[400]; bool open;     /* names of tasks; whether it was opened */
    struct Block *kept, *taken;              /* memory until the end; until the next question */
    struct Head *head; const void *table[TABLES]; u32 count[TABLES]; Task *tasks;
    const OrtApi *ort; OrtEnv *environment; OrtSessionOptions *options; OrtSession *session;
    OrtMemoryInfo *memory; OrtAllocator *allocator; OrtTypeInfo *info;
    size_t first, grows, inputs;             /* the first past, one that grows; all */
    char **input, **output;                  /* "input_ids", ..., pasts; "logits", presents */
    const OrtValue **in; OrtValue **out, *logits[1 + DRAFTED];       /* of 1 to 4 tokens */
    Cache empty; u32 *held; size_t holds;    /* no tokens; those in the buffers */
    int64_t *new_ids, *ones, *positions;     /* of CHUNK tokens; of the context */
    float *scores; size_t rows, most_rows;   /* (rows, vocab): of each token that may come next */
};
#define HAS(flag) (a->head->flags & (flag))

static _Noreturn void fail(Answer *a, const char *format, ...) {
    va_list values;
    va_start(values, format), vsnprintf(a->failure, sizeof a->failure, format, values);
    for (char *s = a->failure; (s = strpbrk(s, "\r\n"));) *s = ' ';
    longjmp(a->back, 1);
}
static _Noreturn void damaged(Answer *a) { fail(a, "answer.bin is damaged: export again"); }
static void *take(Answer *a, size_t n, size_t size) {
    struct Block *block = n < SIZE_MAX / 2 / size ? calloc(1, sizeof *block + n * size) : NULL;
    if (!block) fail(a, "out of memory");
    block->next = a->taken;
    return (a->taken = block) + 1;
}
static void forget(Answer *a, Cache c) {     /* what is the cache's own */
    for (size_t i = 0; i < a->inputs; i++)
        if (c.past[i] && (i < a->first || i >= a->grows))
            a->ort->ReleaseValue(c.past[i]), c.past[i] = NULL;
}
static void give_back(Answer *a, struct Block **blocks) {
    for (struct Block *block; (block = *blocks); *blocks = block->next, free(block))
        if (block->is_past) forget(a, (Cache){(OrtValue **)(block + 1), 0});
}
static double now(void) {
    struct timespec t;
    return clock_gettime(CLOCK_MONOTONIC, &t) ? 0 : t.tv_sec + 1e-9 * t.tv_nsec;
}

/* 1. The table ***********************************************************************************/
static u32 crc(u32 crc, const unsigned char *bytes, size_t n) {
    u32 table[256];
    for (u32 i = 0; i < 256; i++) {
        table[i] = i;
        for (int bit = 0; bit < 8; bit++) table[i] = table[i] >> 1 ^ (table[i] & 1) * 0xEDB88320;
    }
    for (crc = ~crc; n > 0; n--) crc = table[(crc ^ *bytes++) & 0xFF] ^ crc >> 8;
    return ~crc;
}
/* Entry i of a table of numbers, text i, and its copy as a string. A damaged table may point
   anywhere. */
static u32 number(Answer *a, int t, size_t i) {
    if (i >= a->count[t]) damaged(a);
    return ((const u32 *)a->table[t])[i];
}
static const char *text_at(Answer *a, size_t i, u32 *length) {
    u32 at = number(a, STARTS, i), all = a->count[TEXTS];
    *length = number(a, STARTS, i + 1) - at;
    if (at > all || *length > all - at) damaged(a);
    return (const char *)a->table[TEXTS] + at;
}
static char *copy_of(Answer *a, size_t i) {
    u32 length; const char *text = text_at(a, i, &length);
    return memcpy(take(a, length + 1, 1), text, length);
}
static char *path_of(Answer *a, const char *name) {
    char *path = take(a, strlen(a->folder) + strlen(name) + 2, 1);
    return strcat(strcat(strcpy(path, a->folder), "/"), name);
}
static void open_table(Answer *a) {
    const char *path = path_of(a, "answer.bin");
    FILE *file = fopen(path, "rb");
    if (!file) fail(a, "cannot read %s: export.py RUN --port writes it", path);
    long bytes = fseek(file, 0, SEEK_END) ? 0 : ftell(file), size = sizeof *a->head;
    rewind(file), a->head = calloc(1, bytes > size ? bytes : size);
    bool good = a->head && bytes > 0 && fread(a->head, bytes, 1, file) == 1;
    fclose(file);
    if (!good || memcmp(a->head->name, "answer.2", 8))
        fail(a, "%s is not of version 2: take the answer.c that was exported with it", path);
    const unsigned char *start = (unsigned char *)a->head;
    good = bytes >= size && a->head->hash == crc(0, start + 12, bytes - 12);
    for (int t = 0; good && t < TABLES; t++) {
        uint64_t at = a->head->table[t].at, width = t == TEXTS ? 1 : t < MERGES ? 4 : 16;
        a->table[t] = start + at, a->count[t] = a->head->table[t].count;
        good = at % 8 == 0 && at + a->count[t] * width <= (uint64_t)bytes;
    }
    if (!good || !a->count[PROMPT] || !a->head->vocab) fail(a, "%s is damaged: export again", path);
    a->tasks = take(a, a->count[TASKS] + 1, sizeof *a->tasks);
    for (u32 i = 0, used = 0; i < a->count[TASKS]; i++, used = strlen(a->names)) {
        const Row *row = (const Row *)a->table[TASKS] + i;
        a->tasks[i] = (Task){copy_of(a, row->first), copy_of(a, row->second), row->a, row->b};
        snprintf(a->names + used, sizeof a->names - used, i ? ", %s" : "%s", a->tasks[i].name);
    }
    if (!*a->names) strcpy(a->names, "none");
}
/* The row of a sorted table that begins with (first, second), or NULL. */
static const Row *find(Answer *a, int t, u32 first, u32 second) {
    const Row *row = a->table[t];
    uint64_t key = (uint64_t)first << 32 | second;
    for (size_t rows = a->count[t], half; rows > 1; rows -= half)
        if (row[half = rows / 2].key <= key) row += half;
    return a->count[t] && row->key == key ? row : NULL;
}
/* How many of the numbers c a tree knows from its root on, and the value there: the most that have
   a value, else 0. */
static size_t longest(Answer *a, int t, const u32 *c, size_t n, u32 *value) {
    const Row *row; size_t length = 0;
    for (size_t i = 0, node = 0; i < n && (row = find(a, t, node, c[i])); node = row->a, i++)
        if (row->b != NONE) *value = row->b, length = i + 1;
    return length;
}

/* 2. Characters **********************************************************************************/
/* The length of the character at `text`, which becomes `c`; 0 if this is no UTF-8. */
static size_t read_character(const char *text, size_t most, u32 *c) {
    static const u32 least[] = {0, 0, 0x80, 0x800, 0x10000};
    const unsigned char *s = (const unsigned char *)text;
    size_t length = *s < 0x80 ? 1 : *s < 0xE0 ? 2 : *s < 0xF0 ? 3 : 4;
    if (length > most || (*s >= 0x80 && *s < 0xC0) || *s > 0xF7) return 0;
    *c = length == 1 ? *s : *s & (0x7F >> length);
    for (size_t i = 1; i < length; *c = *c << 6 | (s[i++] & 0x3F)) if (s[i] >> 6 != 2) return 0;
    return *c >= least[length] && *c < 0x110000 && *c >> 11 != 0x1B ? length : 0;
}
static size_t write_character(char *to, u32 c) {
    size_t length = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t i = length - 1; i > 0; i--, c >>= 6) to[i] = 0x80 | (c & 0x3F);
    to[0] = c | (length == 1 ? 0 : 0xF00 >> length);
    return length;
}
/* A character's kind: bits, and from bit 8 on its class as a combining mark, or 0. */
static u32 kind(Answer *a, u32 c) {
    return number(a, KINDS, number(a, PAGES, c >> 8) << 8 | (c & 0xFF));
}
/* Normal form C (Unicode's Annex 15): take characters apart, sort the marks behind each by their
   class, and compose what goes together. `to` has room for five times as many. */
static size_t normal_form(Answer *a, const u32 *c, size_t length, u32 *to) {
    size_t n = 0, kept = 0, base = 0;        /* base: of what is kept, the last that is no mark */
    for (size_t i = 0; i < length; i++) {
        const Row *row = find(a, PARTS, c[i], 0);
        for (u32 part = 0; part == 0 || (row && part < 5); row = find(a, PARTS, c[i], ++part)) {
            u32 here = row ? row->a : c[i], class = kind(a, here) >> 8;
            size_t at = n++;
            for (; class && at && kind(a, to[at - 1]) >> 8 > class; at--) to[at] = to[at - 1];
            to[at] = here;
        }
    }
    for (u32 i = 0, last = 0; i < n; i++) {  /* last: the class of the last that is kept */
        u32 class = kind(a, to[i]) >> 8;
        const Row *row = kept && (last < class || !last) ? find(a, WHOLES, to[base], to[i]) : NULL;
        if (row) { to[base] = row->a; continue; }
        if (!class) base = kept;
        last = class;
        to[kept++] = to[i];
    }
    return kept;
}

/* 3. Words ***************************************************************************************/
/* Behind the characters from i on that are, or are not, of these kinds. */
static size_t skip(const u32 *kinds, size_t i, size_t end, u32 these, bool are) {
    while (i < end && !(kinds[i] & these) != are) i++;
    return i;
}
/* The end of the word at i, as the regular expressions of GPT-2 and Llama 3 find it. L: letters,
   for Qwen 3.5 marks as well; N: numbers, as many as head->numbers; S: white space.
    '(s|t|re|ve|m|ll|d)|             ?L+| ?N+| ?[^SLN]+       |           S+(?!not S)|S+    GPT-2
    the same in any case|[^\r\n L N]?L+|  N+| ?[^SLN]+[\r\n]*|S*[\r\n]+|S+(?!not S)|S+    Llama 3 */
static size_t word_end(Answer *a, const u32 *c, const u32 *kinds, size_t i, size_t end) {
    bool gpt2 = a->head->words == GPT2, space = c[i] == ' ';
    bool line_end = c[i] == '\r' || c[i] == '\n';
    u32 L = HAS(MARKS) ? LETTER | MARK : LETTER, s = i + 1 < end ? c[i + 1] : 0;
    u32 here = kinds[i], then = s ? kinds[i + 1] : 0, t = i + 2 < end ? c[i + 2] : 0;
    if (!gpt2) s = s == 0x17F ? 's' : s | 0x20, t |= 0x20;       /* any case; 0x17F is a long s */
    if (c[i] == '\'' && (s == 's' || s == 't' || s == 'm' || s == 'd')) return i + 2;
    if (c[i] == '\'' && (t == 'e' ? s == 'r' || s == 'v' : t == 'l' && s == 'l')) return i + 3;
    if (here & L || (then & L && (gpt2 ? space : !(here & NUMBER) && !line_end)))
        return skip(kinds, i + 1, end, L, true);
    u32 numbers = a->head->numbers;
    size_t most = numbers && end - i > numbers ? i + numbers : end;
    if (here & NUMBER || (then & NUMBER && gpt2 && space))
        return skip(kinds, i + 1, most, NUMBER, true);
    size_t at = i + (space && i + 1 < end), stop = skip(kinds, i, end, SPACE, true);
    if (!(kinds[at] & (SPACE | L | NUMBER))) {
        at = skip(kinds, at, end, SPACE | L | NUMBER, false);
        while (!gpt2 && at < end && (c[at] == '\r' || c[at] == '\n')) at++;
        return at;
    }
    for (at = stop; !gpt2 && at > i; at--) if (c[at - 1] == '\r' || c[at - 1] == '\n') return at;
    return stop == end || stop == i + 1 ? stop : stop - 1;       /* the last begins the next word */
}

/* 4. Tokens **************************************************************************************/
/* A token of a word: its neighbours, and the merge with the next one, or NULL. */
typedef struct { u32 last, next; const Row *merge; } Piece;
/* Put the merge of piece i and the next one into the heap, of which the least is on top. */
static void push(Answer *a, Piece *piece, const u32 *ids, u32 i, size_t n, uint64_t *heap) {
    u32 next = piece[i].next;
    const Row *row = piece[i].merge = next < n ? find(a, MERGES, ids[i], ids[next]) : NULL;
    if (!row) return;
    uint64_t key = (uint64_t)row->a << 32 | i, at = ++heap[0];       /* heap[0]: its size */
    for (; at > 1 && heap[at / 2] > key; at /= 2) heap[at] = heap[at / 2];
    heap[at] = key;
}
static uint64_t pop(uint64_t *heap) {
    uint64_t top = heap[1], last = heap[heap[0]--], n = heap[0], at = 1, child;
    for (; (child = 2 * at) <= n; heap[at] = heap[child], at = child) {
        if (child < n && heap[child + 1] < heap[child]) child++;
        if (last <= heap[child]) break;
    }
    return heap[at] = last, top;
}
/* Byte-pair encoding: of all neighbours that are a merge, those of the lowest rank become a token,
   and so on until there are none. Returns how many tokens `ids` has got. */
static size_t encode_word(Answer *a, const u32 *c, size_t length, u32 *ids) {
    size_t n = 0, kept = 0; char bytes[4];
    if (HAS(WHOLE_WORDS) && longest(a, NAMES, c, length, ids) == length) return 1;
    for (size_t i = 0; i < length; i++) {
        size_t size = write_character(bytes, c[i]);
        if (HAS(CHARACTERS) && longest(a, NAMES, c + i, 1, ids + n)) n++, size = 0;
        for (size_t b = 0; b < size; b++, n += ids[n] != NONE)       /* else it is left out */
            ids[n] = number(a, BYTES, (unsigned char)bytes[b]);
    }
    if (n < 2) return n;
    Piece *piece = take(a, n + 1, sizeof *piece);
    uint64_t *heap = take(a, 3 * n, sizeof *heap);
    for (size_t i = 0; i < n; i++) piece[i].last = i - 1, piece[i].next = i + 1;
    for (size_t i = 0; i < n; i++) push(a, piece, ids, i, n, heap);
    while (heap[0]) {
        uint64_t key = pop(heap);
        u32 i = key, next = piece[i].next;
        const Row *row = piece[i].merge;
        if (!row || row->a != key >> 32) continue;       /* a neighbour has become a token since */
        ids[i] = row->b, ids[next] = NONE, piece[next].merge = NULL;
        piece[i].next = piece[next].next, piece[piece[next].next].last = i;
        push(a, piece, ids, i, n, heap);
        if (i) push(a, piece, ids, piece[i].last, n, heap);
    }
    for (size_t i = 0; i < n; i = piece[i].next) ids[kept++] = ids[i];
    return kept;
}
/* The tokens of characters. Special tokens and the longest texts of ADDED are cut out from left to
   right; what is between them is words. */
static size_t encode(Answer *a, const u32 *c, size_t n, u32 *ids) {
    size_t tokens = 0, cut = 0;
    for (size_t from = 0, to = 0; from < n; from = to += cut) {
        u32 id = NONE;
        for (cut = 0; to < n && !cut; to += !cut)
            if (c[to] < SPECIAL) cut = longest(a, ADDED, c + to, n - to, &id);
            else id = c[to] - SPECIAL, cut = 1;
        size_t length = to - from;
        u32 *text = take(a, 10 * length + 1, sizeof *text), *kinds = text + 5 * length;
        memcpy(text, c + from, length * sizeof *c);
        if (HAS(NORMAL_FORM)) length = normal_form(a, c + from, length, text);
        for (size_t i = 0; i < length; i++) kinds[i] = kind(a, text[i]);
        for (size_t i = 0, end = 0, next; i < length; i = next) {
            if (i == end) {                  /* the words up to the next digit, or that digit */
                end = HAS(DIGITS) ? skip(kinds, i, length, DIGIT, false) : length;
                end += end == i;
            }
            next = a->head->words ? word_end(a, text, kinds, i, end) : end;
            tokens += encode_word(a, text + i, next - i, ids + tokens);
        }
        if (cut) ids[tokens++] = id;
    }
    return tokens;
}
/* The characters of a text, `c`; returns how many. */
static size_t decode(Answer *a, const char *text, size_t length, u32 *c) {
    size_t n = 0;
    for (size_t i = 0, size; i < length; i += size)
        if (!(size = read_character(text + i, length - i, c + n++)))
            fail(a, "byte %zu of the question is no UTF-8", i + 1);
    return n;
}
/* Takes white space around n characters away; returns how many are left. */
static size_t strip(Answer *a, u32 *c, size_t n) {
    size_t first = 0;
    while (n && kind(a, c[n - 1]) & BLANK) n--;
    while (first < n && kind(a, c[first]) & BLANK) first++;
    memmove(c, c + first, (n - first) * sizeof *c);
    return n - first;
}
/* The tokens of an instruction and a question within the chat template; `size` says how many. A
   question that begins with the instruction is not given it twice. */
static u32 *prompt_of(Answer *a, const char *instruction, const char *text, size_t length,
                      bool trim, size_t *size) {
    size_t before = a->count[BEFORE], after = a->count[AFTER], most = strlen(instruction) + length;
    u32 *c = take(a, before + most + after + 1, sizeof *c), *content = c + before;
    size_t given = decode(a, instruction, strlen(instruction), content);
    u32 *question = content + given;
    size_t n = decode(a, text, length, question);
    if (trim) n = strip(a, question, n);
    if (!n) fail(a, "the question is empty");
    if (given > n || memcmp(content, question, given * sizeof *c)) n += given;
    else memmove(content, question, n * sizeof *c);
    if (HAS(STRIP)) n = strip(a, content, n);
    memcpy(c, a->table[BEFORE], before * sizeof *c);
    memcpy(content + n, a->table[AFTER], after * sizeof *c);
    u32 *ids = take(a, 12 * (before + n + after) + 1, sizeof *ids);
    *size = encode(a, c, before + n + after, ids);
    return ids;
}

/* 5. The model ***********************************************************************************/
static void call(Answer *a, OrtStatus *status) {
    if (!status) return;
    char said[1000];
    snprintf(said, sizeof said, "%s", a->ort->GetErrorMessage(status));
    a->ort->ReleaseStatus(status);
    fail(a, "onnxruntime: %s", said);
}
static OrtValue *tensor(Answer *a, void *data, int type, const int64_t *shape, size_t dimensions) {
    OrtValue *value;
    size_t bytes = type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 ? 8 : 4;    /* float16: 2 */
    for (size_t d = 0; d < dimensions; d++) bytes *= shape[d];
    call(a, a->ort->CreateTensorWithDataAsOrtValue(
        a->memory, data ? data : take(a, bytes, 1), bytes, shape, dimensions, type, &value));
    return value;
}
static size_t shape_of(Answer *a, OrtStatus *status, int64_t *shape, int *type) {
    const OrtTensorTypeAndShapeInfo *about; size_t n; ONNXTensorElementDataType element;
    call(a, status), call(a, a->ort->CastTypeInfoToTensorInfo(a->info, &about));
    call(a, a->ort->GetTensorElementType(about, &element));
    call(a, a->ort->GetDimensionsCount(about, &n));
    call(a, a->ort->GetDimensions(about, shape, n = n < 8 ? n : 8));
    a->ort->ReleaseTypeInfo(a->info), a->info = NULL, *type = element;
    return n;
}
/* Input i of the graph, a past, before all tokens, and the name of its present. Keys and values are
   one buffer for the whole context, into which each step writes (SHARED), or grow from nothing with
   each step; the states of convolutions and delta nets are zeros. */
static void open_past(Answer *a, size_t i) {
    const char *name = a->input[i]; int type; int64_t shape[8];
    size_t keys = strncmp(name, "past_key_values.", 16) ? 0 : 11;
    size_t n = shape_of(a, a->ort->SessionGetInputTypeInfo(a->session, i, &a->info), shape, &type);
    if ((!keys || !HAS(SHARED)) && a->grows > i) a->grows = i;
    for (size_t d = 0; d < n; d++)           /* -1 is the batch, or the number of tokens */
        if (shape[d] < 0) shape[d] = !d ? 1 : i < a->grows ? a->head->context : 0;
    a->empty.past[i] = tensor(a, NULL, type, shape, n);
    a->output[i] = strcat(strcpy(take(a, strlen(name) + 8, 1), "present"), name + 4 + keys);
}
static void open_model(Answer *a, int threads) {
    static const char *const known[] = {"input_ids", "attention_mask", "position_ids", ""};
    const char *version = OrtGetApiBase()->GetVersionString();
    int type, major = 0, minor = 0; int64_t shape[8] = {0}; const u32 context = a->head->context;
    sscanf(version, "%d.%d", &major, &minor);
    if (100 * major + minor < 130)           /* whose GetApi would print 1,000 lines */
        fail(a, "onnxruntime %s is too old: link 1.30 or later", version);
    const OrtApi *ort = a->ort = OrtGetApiBase()->GetApi(21);
    call(a, ort->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "answer", &a->environment));
    call(a, ort->CreateSessionOptions(&a->options));
    call(a, ort->SetIntraOpNumThreads(a->options, threads));
    call(a, ort->CreateSession(a->environment, path_of(a, "model.onnx"), a->options, &a->session));
    call(a, ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &a->memory));
    call(a, ort->GetAllocatorWithDefaultOptions(&a->allocator));
    size_t inputs; call(a, ort->SessionGetInputCount(a->session, &inputs));
    a->input = take(a, inputs, sizeof *a->input), a->output = take(a, inputs, sizeof *a->output);
    a->in = take(a, inputs, sizeof *a->in), a->out = take(a, inputs, sizeof *a->out);
    a->empty.past = take(a, inputs, sizeof *a->empty.past), a->grows = SIZE_MAX;
    for (size_t i = 0; i < inputs; i++) {
        a->inputs = i + 1;
        call(a, ort->SessionGetInputName(a->session, i, a->allocator, &a->input[i]));
        if (!strncmp(a->input[i], "past_", 5)) open_past(a, i);
        else if (strcmp(a->input[i], known[a->first++]))
            fail(a, "answer.c knows no input %s", a->input[i]);
    }
    shape_of(a, ort->SessionGetOutputTypeInfo(a->session, 0, &a->info), shape, &type);
    a->most_rows = shape[1] == 1 ? 1 : 1 + DRAFTED;
    a->held = take(a, context, sizeof *a->held), a->new_ids = take(a, CHUNK, sizeof *a->new_ids);
    a->ones = take(a, context, sizeof *a->ones), a->positions = take(a, context, sizeof(int64_t));
    for (u32 i = 0; i < context; i++) a->ones[i] = 1, a->positions[i] = i;
    a->scores = take(a, a->most_rows * a->head->vocab, sizeof *a->scores);
    a->output[a->first - 1] = "logits";
    for (size_t n = 1; n <= a->most_rows; n++)
        a->logits[n - 1] = tensor(a, a->scores, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
                                  (int64_t[]){1, n, a->head->vocab}, 3);
}
/* Read tokens, CHUNK at a time and what is left over first: a cache that holds them, too, and the
   scores of what may come next. What grows or changes is new in it, so `from` can be used again. */
static Cache read_tokens(Answer *a, Cache from, const u32 *ids, size_t n) {
    if (n > CHUNK) {
        Cache part = read_tokens(a, from, ids, n -= CHUNK);
        Cache all = read_tokens(a, part, ids + n, CHUNK);
        return forget(a, part), all;
    }
    size_t first = a->first, inputs = a->inputs;
    Cache to = {take(a, inputs, sizeof *to.past), from.length + n};
    a->taken->is_past = true;
    int64_t *data[] = {a->new_ids, a->ones, a->positions + from.length}, shape[] = {1, 0};
    if (to.length > a->head->context) damaged(a);
    a->holds = from.length;                  /* should the step fail */
    for (size_t i = 0; i < n; i++)
        if ((a->new_ids[i] = a->held[from.length + i] = ids[i]) >= a->head->vocab) damaged(a);
    for (size_t i = 0; i < first; i++) {
        shape[1] = i == 1 ? to.length : n;
        a->in[i] = to.past[i] = tensor(a, data[i], ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, shape, 2);
    }
    for (size_t i = first; i < inputs; i++)
        a->in[i] = from.past[i], a->out[i] = i < a->grows ? from.past[i] : NULL;
    a->rows = n > SHORT ? 1 : n < a->most_rows ? n : a->most_rows;
    a->out[first - 1] = a->logits[a->rows - 1];
    call(a, a->ort->Run(a->session, NULL, (const char **)a->input, a->in, inputs,
                        (const char **)a->output + first - 1, inputs - first + 1,
                        a->out + first - 1));
    for (size_t i = 0; i < first; i++) a->ort->ReleaseValue(to.past[i]), to.past[i] = NULL;
    memcpy(to.past + first, a->out + first, (inputs - first) * sizeof *to.past);
    return a->holds = to.length, to;
}

/* 6. Answers *************************************************************************************/
/* The score of a token that may come next, behind all that was read. */
static float score(Answer *a, u32 id) {
    if (id >= a->head->vocab) damaged(a);
    return a->scores[(a->rows - 1) * a->head->vocab + id];
}
/* log(sum of e^x): the log-probability of i among these is x[i] - log_of_sum(x, n). */
static double log_of_sum(Answer *a, const float *x, size_t n) {
    double highest = x[0], sum = 0;
    for (size_t i = 1; i < n; i++) if (x[i] > highest) highest = x[i];
    for (size_t i = 0; i < n; i++) sum += exp(x[i] - highest);
    if (!isfinite(sum)) fail(a, "the model's scores are not numbers");
    return highest + log(sum);
}
static bool is_stop(Answer *a, u32 id) {
    for (u32 i = 0; i < a->count[STOPS]; i++) if (number(a, STOPS, i) == id) return true;
    return false;
}
/* A guess of the token after a text: what followed the longest of its ends that it has before, the
   latest time; else what DRAFTS says. runtime/drafts.py has the same rule. */
static u32 guess(Answer *a, const u32 *text, size_t n) {
    u32 found = NONE, end[SUFFIX]; size_t best = 1, suffix = n < SUFFIX ? n : SUFFIX;
    for (size_t e = n - 1, k; e >= 2 && e + WINDOW >= n; e--) {
        for (k = 0; k < REPEATED && k < e && text[e - 1 - k] == text[n - 1 - k];) k++;
        if (k > best) best = k, found = text[e];
    }
    for (size_t k = 0; k < suffix; k++) end[k] = text[n - 1 - k];
    if (found == NONE) longest(a, DRAFTS, end, suffix, &found);
    return found;
}
/* The tokens that the model writes: the likeliest one again and again. A step reads guesses with
   the last token, at least one, as kernels round a step of one token otherwise. Those that the
   model itself would have written are kept, the others are taken out of the cache, which only
   buffers that do not grow allow. */
static u32 *generate(Answer *a, Cache cache, size_t most, AnswerResult *r) {
    u32 *ids = take(a, most + 1, sizeof *ids), vocab = a->head->vocab;
    size_t row = a->rows - 1, prompt = cache.length;
    bool drafts = a->count[DRAFTS] && a->most_rows > 1 && a->grows >= a->inputs;
    for (r->tokens = 0; r->tokens < most;) {
        const float *x = a->scores + row * vocab; u32 best = 0;
        for (u32 i = 1; i < vocab; i++) if (x[i] > x[best]) best = i;
        r->logprob += x[best] - log_of_sum(a, x, vocab);
        if (!r->first_token) r->first_token = now();
        if (is_stop(a, best)) break;
        ids[r->tokens++] = best;
        if (r->tokens == most) break;
        u32 *text = a->held; size_t length = prompt + r->tokens, guesses = 0;
        if (++row < a->rows && text[length - 1] == best) continue;       /* it was guessed */
        Cache last = cache;
        last.length = length - 1, text[length - 1] = best, row = 0, r->steps++;
        for (u32 id; drafts && guesses < DRAFTED && guesses + 1 < most - r->tokens; guesses++) {
            if ((id = guess(a, text, length + guesses)) == NONE || is_stop(a, id)) break;
            text[length + guesses] = id;
        }
        if (drafts && !guesses) text[length] = best, guesses = 1;
        cache = read_tokens(a, last, text + last.length, 1 + guesses), forget(a, last);
    }
    return forget(a, cache), ids;
}
/* The text of n tokens: without white space before it, and U+FFFD for what is no UTF-8. */
static const char *text_of(Answer *a, const u32 *ids, size_t n) {
    size_t length = 0, at = 0; u32 c, size;
    for (size_t i = 0; i < n; i++, length += size) text_at(a, ids[i], &size);
    char *bytes = take(a, length + 1, 1), *text = take(a, 3 * length + 1, 1), *to = text;
    for (size_t i = 0; i < n; i++, at += size) {
        const char *part = text_at(a, ids[i], &size);
        memcpy(bytes + at, part, size);
    }
    for (size_t i = 0; i < length; i += size) {
        if (!(size = read_character(bytes + i, length - i, &c)) || !c) c = 0xFFFD, size = 1;
        if (to > text || !(kind(a, c) & BLANK)) to += write_character(to, c);
    }
    return text;
}
/* Put an answer of the set among the likeliest ones, of which the last may leave. */
static void add(Answer *a, const Row *row, double p, AnswerResult *r) {
    AnswerChoice *choices = (AnswerChoice *)r->choices;
    size_t at = r->found < r->best ? r->found++ : r->best - 1;
    for (; at && choices[at - 1].logprob < p; at--) choices[at] = choices[at - 1];
    choices[at] = (AnswerChoice){copy_of(a, row->a), p};
}
/* Add the answers behind a node of CHOICES that are likelier than the last of r->choices. p: the
   node's log-probability; `ids` before it are still unread. A token competes with those alone that
   may stand in its place; where there is no other it is read without a choice. */
static void search(Answer *a, Cache from, u32 *ids, size_t unread, u32 node, double p,
                   AnswerResult *r) {
    const Row *row, *rows = a->table[CHOICES]; u32 n;
    for (; ; ids[unread++] = row->second, node = row->a) {
        for (n = 0, row = rows + node; node + n < a->count[CHOICES] && row[n].first == node;) n++;
        if (n > 1) break;
        if (n == 1 && row->b != NONE) { add(a, row, p, r); return; }
        if (!n || row->a <= node) damaged(a);
    }
    Cache cache = read_tokens(a, from, ids, unread);
    float *x = take(a, n, sizeof *x);
    for (u32 i = 0; i < n; i++) x[i] = score(a, row[i].second);
    double sum = log_of_sum(a, x, n), q;
    for (u32 k = 0; ; x[k] = -1e30f) {       /* the likeliest first, until none can win */
        for (u32 i = 0; i < n; i++) if (x[i] > x[k]) k = i;
        q = p + x[k] - sum;
        if (q <= (r->found < r->best ? -1e29 : r->choices[r->best - 1].logprob)) break;
        if (row[k].b != NONE) add(a, row + k, q, r);
        else if (row[k].a <= node) damaged(a);
        else ids[0] = row[k].second, search(a, cache, ids, 1, row[k].a, q, r);
    }
    forget(a, cache);
}
static void answer(Answer *a, const char *question, const char *name, AnswerResult *r) {
    double start = now(); const Task *task = NULL;
    for (u32 i = 0; i < a->count[TASKS]; i++)
        if (name ? !strcmp(name, a->tasks[i].name) : a->count[TASKS] == 1) task = a->tasks + i;
    if (name && !task) fail(a, "the folder has no task %s: it has %s", name, a->names);
    if (r->best && !task) fail(a, "name a task with a set of answers: there is %s", a->names);
    if (r->best && task->node == NONE) fail(a, "the task %s has no set of answers", task->name);
    u32 *ids = prompt_of(a, task ? task->instruction : "", question, strlen(question), r->trim,
                         &r->prompt_tokens), longest_answer = r->best ? task->longest : 1;
    if (r->prompt_tokens + longest_answer > a->head->context)
        fail(a, "the question has %zu tokens, which leaves no room for an answer in the context of "
             "%u", r->prompt_tokens, a->head->context);
    Cache from = a->empty;                   /* and what the prompt shares with the text held */
    while (a->grows >= a->inputs && from.length < a->holds && from.length + 2 < r->prompt_tokens &&
           a->held[from.length] == ids[from.length]) from.length++;
    size_t unread = r->prompt_tokens - from.length, room = a->head->context - r->prompt_tokens;
    ids += from.length;
    if (r->best) {
        if (r->best > a->count[CHOICES]) r->best = a->count[CHOICES];
        r->choices = take(a, r->best, sizeof *r->choices);
        search(a, from, ids, unread, task->node, 0, r);
        r->text = r->choices->text, r->logprob = r->choices->logprob, r->first_token = now();
    } else {
        Cache cache = read_tokens(a, from, ids, unread);
        ids = generate(a, cache, r->most && r->most < room ? r->most : room, r);
        r->text = text_of(a, ids, r->tokens);
    }
    r->first_token -= start;
}
/* Fail unless this device computes as the one that exported. */
static void check(Answer *a) {
    static const char *const files[] = {"model.onnx", "model.onnx.data"};
    unsigned char *bytes = take(a, 1 << 16, 1); u32 hash = 0, size;
    for (int i = 0; i < 2; i++) {
        FILE *file = fopen(path_of(a, files[i]), "rb");
        for (size_t n; file && (n = fread(bytes, 1, 1 << 16, file));) hash = crc(hash, bytes, n);
        if (file) fclose(file);
    }
    if (hash != a->head->model) fail(a, "model.onnx or its data are not those of the export");
    const char *question = text_at(a, a->head->question, &size);
    const u32 *prompt = a->table[PROMPT]; size_t n, count = a->count[PROMPT];
    u32 *ids = prompt_of(a, "", question, size, false, &n);
    if (n < count || memcmp(ids, prompt, count * sizeof *ids))       /* cut, in a small context */
        fail(a, "the tokens of the question are not those of the export");
    Cache cache = read_tokens(a, a->empty, prompt, count);
    float most = 0, apart = 0, off; AnswerResult r = {0};
    for (u32 i = 0; i < a->head->vocab; i++) most = fmaxf(most, fabsf(score(a, i)));
    for (const Row *row = a->table[LARGEST], *end = row + a->count[LARGEST]; row < end; row++) {
        memcpy(&off, &row->a, sizeof off);
        off = fabsf(off - score(a, row->first));
        if (!(off <= apart)) apart = off;    /* no number, too */
    }
    ids = generate(a, cache, a->count[FOLLOWING], &r);
    bool same = r.tokens == a->count[FOLLOWING] && !memcmp(ids, a->table[FOLLOWING], 4 * r.tokens);
    if (!same || !(apart <= a->head->tolerance * most))
        fail(a, "this device computes otherwise: %s text, scores within %.1e of the largest; "
             "%.1e is allowed", same ? "the same" : "another", apart / most, a->head->tolerance);
}

/* 7. What answer.h declares **********************************************************************/
static void release(Answer *a) {             /* all but the error */
    const OrtApi *ort = a->ort;
    give_back(a, &a->taken);
    for (size_t i = 0; i < a->inputs; i++) {
        if (a->empty.past[i]) ort->ReleaseValue(a->empty.past[i]);
        if (a->input[i] && a->allocator->Free) a->allocator->Free(a->allocator, a->input[i]);
    }
    for (size_t i = 0; i <= DRAFTED; i++) if (a->logits[i]) ort->ReleaseValue(a->logits[i]);
    if (a->info) ort->ReleaseTypeInfo(a->info);
    if (a->memory) ort->ReleaseMemoryInfo(a->memory);
    if (a->session) ort->ReleaseSession(a->session);
    if (a->options) ort->ReleaseSessionOptions(a->options);
    if (a->environment) ort->ReleaseEnv(a->environment);
    give_back(a, &a->kept), free(a->head), a->open = false;
}
Answer *open_answer(const char *folder, int threads) {
    Answer *a = calloc(1, sizeof *a);
    if (!a) return NULL;
    if (setjmp(a->back)) return a->kept = a->taken, a->taken = NULL, release(a), a;
    a->folder = strcpy(take(a, strlen(folder) + 1, 1), folder);
    open_table(a), open_model(a, threads);
    a->kept = a->taken, a->taken = NULL, a->open = true;
    return a;
}
int ask_answer(Answer *a, const char *question, const char *task, AnswerResult *r) {
    *r = (AnswerResult){.most = r->most, .best = r->best, .trim = r->trim, .text = ""};
    if (!a || !a->open) return 1;
    give_back(a, &a->taken), *a->failure = 0;
    if (setjmp(a->back)) return r->text = "", r->found = 0, 1;
    return answer(a, question, task, r), 0;
}
int check_answer(Answer *a) {
    if (!a || !a->open) return 1;
    give_back(a, &a->taken), *a->failure = 0;
    return setjmp(a->back) ? 1 : (check(a), 0);
}
const char *answer_error(const Answer *a) { return a ? a->failure : "out of memory"; }
void close_answer(Answer *a) { if (a && a->open) release(a); free(a); }

#ifndef ANSWER_LIBRARY
static void refuse(const char *what, const char *why) {
    fprintf(stderr, "error: %s: %s\n", what, why), exit(2);
}
/* The value of argument i, if that is the flag `name`: --name=VALUE or --name VALUE. */
static char *value_of(char **argv, int *i, const char *name) {
    size_t n = strlen(name);
    if (strncmp(argv[*i], name, n) || (argv[*i][n] && argv[*i][n] != '=')) return NULL;
    char *value = argv[*i][n] ? argv[*i] + n + 1 : argv[++*i];
    return value ? value : (refuse(name, "give a value"), value);
}
static bool natural(char **argv, int *i, const char *name, long most, size_t *to) {
    char *text = value_of(argv, i, name), *end, why[64];
    long n = text ? strtol(text, &end, 10) : 0;
    snprintf(why, sizeof why, "give a number from 1 to %ld", most);
    if (text && (*end || n < 1 || n > most)) refuse(name, why);
    return text && (*to = n);
}
int main(int argc, char **argv) {
    static const char usage[] = "answer FOLDER [QUESTION] [--task NAME] [--choices] "
                                "[--max-tokens N] [--threads N] [--check]";
    char *folder = NULL, *text = NULL, *task = NULL, *value; AnswerResult r = {0};
    size_t size = 0, number = 0, bad = 0, threads = 0; bool checks = false, instructed = false;
    for (int i = 1; i < argc; i++)
        if (!strcmp(argv[i], "--help")) return printf("usage: %s\n", usage) < 0;
        else if (!strcmp(argv[i], "--check")) checks = true;
        else if (!strcmp(argv[i], "--choices")) r.best = 1;
        else if ((value = value_of(argv, &i, "--task"))) task = value;
        else if (natural(argv, &i, "--threads", 512, &threads) ||
                 natural(argv, &i, "--max-tokens", 1 << 24, &r.most)) continue;
        else if (!strncmp(argv[i], "--", 2) || (folder && text)) refuse(argv[i], usage);
        else *(folder ? &text : &folder) = argv[i];
    if (!folder) refuse("no folder", usage);
    Answer *a = open_answer(folder, threads);
    if (*answer_error(a) || (checks && check_answer(a)))
        return fprintf(stderr, "error: %s\n", answer_error(a)), close_answer(a), 1;
    for (u32 i = 0; i < a->count[TASKS]; i++) instructed |= *a->tasks[i].instruction;
    if (!task && instructed && a->count[TASKS] > 1)
        fprintf(stderr, "[asked without an instruction: name the task by --task: %s]\n", a->names);
    bool lines = (r.trim = !text);
    while (!checks) {
        ssize_t n = lines ? getline(&text, &size, stdin) : (ssize_t)strlen(text);
        if (n < 0) break;
        bool mark = ++number == 1 && lines && !strncmp(text, "\xef\xbb\xbf", 3);
        double start = now();
        const char *why = (size_t)n != strlen(text) ? "a byte is zero" :
                          ask_answer(a, text + 3 * mark, task, &r) ? answer_error(a) : NULL;
        for (const char *s = why ? "" : r.text; *s; s++)
            if (!lines || (*s != '\n' && *s != '\r')) putchar(*s);
            else fputs(*s == '\n' ? "\\n" : "\\r", stdout);
        if ((lines || !why) && (putchar('\n') < 0 || fflush(stdout)))
            refuse("standard output", "cannot write the answer");
        if (why && lines) fprintf(stderr, "line %zu: %s\n", number, why), bad++;
        else if (why) return fprintf(stderr, "error: %s\n", why), close_answer(a), 1;
        else fprintf(stderr, "[log-probability %.4f (%.1f %%), first token after %.3f s, %zu "
                     "tokens at %.1f/s]\n", r.logprob, 100 * exp(r.logprob), r.first_token,
                     r.tokens, r.tokens / (now() - start - r.first_token));
        if (!lines) break;
    }
    if (!number && !checks) bad++, fputs("error: the standard input has no line\n", stderr);
    else if (bad) fprintf(stderr, "error: %zu of %zu lines have no answer\n", bad, number);
    if (lines) free(text);
    return close_answer(a), bad > 0;
}
#endif
