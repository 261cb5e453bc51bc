/* answer.c: ask a model that `export.py RUN --port` wrote, with onnxruntime's C API and libc alone.

       cc -O2 FOLDER/answer.c -lonnxruntime -o answer
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
    TEXTS,       /* the texts of all tokens, then tasks and their answers, end to end */
    STARTS,      /* where in TEXTS each text starts; it ends where the next one starts */
    BYTES,       /* the token of each of the 256 bytes, or NONE */
    PAGES,       /* which page of KINDS has the characters 256 i to 256 i + 255 */
    KINDS,       /* pages of 256 kinds of characters */
    BEFORE,      /* the chat template before a question: characters, and SPECIAL + special tokens */
    AFTER,       /* the same after a question */
    STOPS,       /* tokens that end an answer */
    PROMPT,      /* tokens by which a device shows that it computes rightly */
    FOLLOWING,   /* those that the model writes after them */
    MERGES,      /* left token, right token, rank, the token that they become; sorted */
    NAMES,       /* texts of tokens, a tree: node, character, next node, a token or NONE; sorted */
    ADDED,       /* the same of texts that are a token before all else, such as two line ends */
    PARTS,       /* a character, i, the i-th part of what it is composed of, 0; sorted */
    WHOLES,      /* two characters, the one that they compose, 0; sorted */
    LARGEST,     /* a token, 0, its score after PROMPT as a float, 0 */
    SETS,        /* a task: the number of its text, 0, the first node of its answers, 0 */
    CHOICES,     /* answers, a tree: node (its first row), token, next node, NONE; if that token */
    TABLES };    /*     ends an answer: node, token, the number of its text, 0; sorted */
enum { GPT2 = 1, LLAMA3 = 2, CHUNK = 512 };  /* head->words (0: a text is one word); of one step */
enum { SHARED = 1, CHARACTERS = 2, WHOLE_WORDS = 4, NORMAL_FORM = 8, DIGITS = 16, MARKS = 32,
       STRIP = 64 };                         /* bits of head->flags */
enum { LETTER = 1, NUMBER = 2, SPACE = 4, MARK = 8, DIGIT = 16, BLANK = 32 };      /* of a kind */
typedef uint32_t u32; typedef union { struct { u32 second, first, a, b; }; uint64_t key; } Row;
static const u32 NONE = UINT32_MAX, SPECIAL = 1u << 31;
static const struct Head {
    char name[8]; uint64_t hash;             /* "answer.1"; of the 64-bit words behind it: FNV-1a */
    u32 vocab, context, longest;             /* tokens: known, to be read; bytes of a text */
    u32 words, numbers, flags, unused;       /* numbers: of a word, at most; 0: any */
    float tolerance;                         /* of LARGEST, as a share of the largest score */
    struct { u32 at, count; } table[TABLES]; /* byte of the file; entries */
} *head;
static const void *table[TABLES]; static u32 count[TABLES];
static size_t asked, prompt_tokens, written; /* questions; tokens of the last one, of its answer */
static double logprob, first_token;          /* of the answer; when its first token was there */
static char failure[1200];
#ifndef ANSWER_FAIL                          /* an app jumps back instead: export/README.md */
#define ANSWER_FAIL(message) (fprintf(stderr, "error: %s\n", message), exit(1))
#endif
#define FAIL(...) (snprintf(failure, sizeof failure, __VA_ARGS__), ANSWER_FAIL(failure))
#define DAMAGED FAIL("answer.bin is damaged: export again")
#define HAS(flag) (head->flags & (flag))

static struct Block { struct Block *next; uint64_t unused; } *taken;   /* until the next question */
static void *take(size_t n, size_t size) {
    struct Block *block = n < SIZE_MAX / 2 / size ? calloc(1, sizeof *block + n * size) : NULL;
    if (!block) FAIL("out of memory");
    block->next = taken;
    return (taken = block) + 1;
}

/* 1. The table ***********************************************************************************/
static void open_table(const char *folder) {
    char path[1024];
    snprintf(path, sizeof path, "%s/answer.bin", folder);
    FILE *file = fopen(path, "rb");
    if (!file) FAIL("cannot read %s: export.py RUN --port writes it", path);
    long bytes = fseek(file, 0, SEEK_END) ? 0 : ftell(file), size = sizeof *head;
    rewind(file), head = calloc(1, bytes > size ? bytes : size);
    bool good = head && bytes > 0 && fread((void *)head, bytes, 1, file) == 1;
    fclose(file);
    if (!good || memcmp(head->name, "answer.1", 8))
        FAIL("%s is not of version 1: take the answer.c that was exported with it", path);
    uint64_t hash = 0xcbf29ce484222325, *words = (void *)head;
    for (long i = 2; i < bytes / 8; i++) hash = (hash ^ words[i]) * 0x100000001b3;
    good = bytes >= size && bytes % 8 == 0 && hash == head->hash;
    for (int t = 0; good && t < TABLES; t++) {
        uint64_t at = head->table[t].at, width = t == TEXTS ? 1 : t < MERGES ? 4 : 16;
        table[t] = (char *)head + at, count[t] = head->table[t].count;
        good = at % 8 == 0 && at + count[t] * width <= (uint64_t)bytes;
    }
    if (!good || !count[PROMPT]) FAIL("%s is damaged: export again", path);
}
/* Entry i of a table of numbers, and a copy of text i. A damaged table may point anywhere. */
static u32 number(int t, size_t i) { return i < count[t] ? ((u32 *)table[t])[i] : (DAMAGED, 0); }
static char *text_at(size_t i, u32 *length) {
    u32 at = number(STARTS, i);
    *length = number(STARTS, i + 1) - at;
    if (*length > head->longest || (uint64_t)at + *length > count[TEXTS]) DAMAGED;
    return memcpy(take(*length + 1, 1), (char *)table[TEXTS] + at, *length);
}
/* The row of a sorted table that begins with (first, second), or NULL. */
static const Row *find(int t, u32 first, u32 second) {
    const Row *row = table[t];
    uint64_t key = (uint64_t)first << 32 | second;
    for (size_t rows = count[t], half; rows > 1; rows -= half)
        if (row[half = rows / 2].key <= key) row += half;
    return count[t] && row->key == key ? row : NULL;
}
/* The length of the longest text of NAMES or ADDED that characters begin with, and its token. */
static size_t longest(int t, const u32 *c, size_t n, u32 *id) {
    const Row *row; size_t length = 0;
    for (size_t i = 0, node = 0; i < n && (row = find(t, node, c[i])); node = row->a, i++)
        if (row->b != NONE) *id = row->b, length = i + 1;
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
static u32 kind(u32 c) { return number(KINDS, number(PAGES, c >> 8) << 8 | (c & 0xFF)); }
/* Normal form C (Unicode's Annex 15): take characters apart, sort the marks behind each by their
   class, and compose what goes together. `to` has room for five times as many. */
static size_t normal_form(const u32 *c, size_t length, u32 *to) {
    size_t n = 0, kept = 0, base = 0;        /* base: of what is kept, the last that is no mark */
    for (size_t i = 0; i < length; i++) {
        const Row *row = find(PARTS, c[i], 0);
        for (u32 part = 0; part == 0 || (row && part < 5); row = find(PARTS, c[i], ++part)) {
            u32 here = row ? row->a : c[i], class = kind(here) >> 8;
            size_t at = n++;
            for (; class && at && kind(to[at - 1]) >> 8 > class; at--) to[at] = to[at - 1];
            to[at] = here;
        }
    }
    for (u32 i = 0, last = 0; i < n; i++) {  /* last: the class of the last that is kept */
        u32 class = kind(to[i]) >> 8;
        const Row *row = kept && (last < class || !last) ? find(WHOLES, to[base], to[i]) : NULL;
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
static size_t word_end(const u32 *c, const u32 *kinds, size_t i, size_t end) {
    bool gpt2 = head->words == GPT2, space = c[i] == ' ', line_end = c[i] == '\r' || c[i] == '\n';
    u32 L = HAS(MARKS) ? LETTER | MARK : LETTER, a = i + 1 < end ? c[i + 1] : 0;
    u32 here = kinds[i], then = a ? kinds[i + 1] : 0, b = i + 2 < end ? c[i + 2] : 0;
    if (!gpt2) a = a == 0x17F ? 's' : a | 0x20, b |= 0x20;       /* any case; 0x17F is a long s */
    if (c[i] == '\'' && (a == 's' || a == 't' || a == 'm' || a == 'd')) return i + 2;
    if (c[i] == '\'' && (b == 'e' ? a == 'r' || a == 'v' : b == 'l' && a == 'l')) return i + 3;
    if (here & L || (then & L && (gpt2 ? space : !(here & NUMBER) && !line_end)))
        return skip(kinds, i + 1, end, L, true);
    size_t most = head->numbers && end - i > head->numbers ? i + head->numbers : end;
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
/* Byte-pair encoding: of all neighbours that are a merge, those of the lowest rank become a token,
   and so on until there are none. Returns how many tokens `ids` has got. */
static size_t encode_word(const u32 *c, size_t length, u32 *ids) {
    size_t n = 0; char bytes[4];
    if (HAS(WHOLE_WORDS) && longest(NAMES, c, length, ids) == length) return 1;
    for (size_t i = 0; i < length; i++) {
        size_t size = write_character(bytes, c[i]);
        if (HAS(CHARACTERS) && longest(NAMES, c + i, 1, ids + n)) n++, size = 0;
        for (size_t b = 0; b < size; b++, n += ids[n] != NONE)       /* else it is left out */
            ids[n] = number(BYTES, (unsigned char)bytes[b]);
    }
    const Row **merge = take(n + 1, sizeof *merge);      /* of a token and the next one, or NULL */
    for (size_t i = 0; i + 1 < n; i++) merge[i] = find(MERGES, ids[i], ids[i + 1]);
    for (size_t best = 0; n > 1; n--, best = 0) {
        for (size_t i = 1; i + 1 < n; i++)
            if (merge[i] && (!merge[best] || merge[i]->a < merge[best]->a)) best = i;
        if (!merge[best]) break;
        ids[best] = merge[best]->b;
        memmove(ids + best + 1, ids + best + 2, (n - best - 2) * sizeof *ids);
        memmove(merge + best, merge + best + 1, (n - best - 1) * sizeof *merge);
        if (best) merge[best - 1] = find(MERGES, ids[best - 1], ids[best]);
        merge[best] = best + 2 < n ? find(MERGES, ids[best], ids[best + 1]) : NULL;
    }
    return n;
}
/* The tokens of characters. Special tokens and the longest texts of ADDED are cut out from left to
   right; what is between them is words. */
static size_t encode(const u32 *c, size_t n, u32 *ids) {
    size_t tokens = 0, cut = 0;
    for (size_t from = 0, to = 0; from < n; from = to += cut) {
        u32 id = NONE;
        for (cut = 0; to < n && !cut; to += !cut)
            cut = c[to] < SPECIAL ? longest(ADDED, c + to, n - to, &id) : (id = c[to] - SPECIAL, 1);
        size_t length = to - from;
        u32 *text = take(10 * length + 1, sizeof *text), *kinds = text + 5 * length;
        memcpy(text, c + from, length * sizeof *c);
        if (HAS(NORMAL_FORM)) length = normal_form(c + from, length, text);
        for (size_t i = 0; i < length; i++) kinds[i] = kind(text[i]);
        for (size_t i = 0, end = length, next; i < length; i = next) {
            if (HAS(DIGITS) && (end = skip(kinds, i, length, DIGIT, false)) == i) end++;
            next = head->words ? word_end(text, kinds, i, end) : end;
            tokens += encode_word(text + i, next - i, ids + tokens);
        }
        if (cut) ids[tokens++] = id;
    }
    return tokens;
}
/* The tokens of a question within the chat template; `prompt_tokens` says how many. */
static u32 *prompt_of(const char *text, size_t length) {
    size_t before = count[BEFORE], after = count[AFTER], n = before, size;
    u32 *c = take(before + length + after + 1, sizeof *c);
    memcpy(c, table[BEFORE], before * sizeof *c);
    for (size_t i = 0; i < length; i += size) {
        if (!(size = read_character(text + i, length - i, c + n)))
            FAIL("question %zu: byte %zu is no UTF-8", asked, i + 1);
        if (!HAS(STRIP) || n > before || !(kind(c[n]) & BLANK)) n++;
    }
    while (HAS(STRIP) && n > before && kind(c[n - 1]) & BLANK) n--;
    memcpy(c + n, table[AFTER], after * sizeof *c);
    u32 *ids = take(12 * (n + after) + count[CHOICES], sizeof *ids);
    return prompt_tokens = encode(c, n + after, ids), ids;
}

/* 5. The model ***********************************************************************************/
typedef struct { OrtValue **past; size_t length; } Cache;    /* keys, values and states of tokens */
static Cache empty; static u32 *held; static size_t holds;   /* no tokens; those in the buffers */
static const OrtApi *ort; static OrtSession *session; static OrtMemoryInfo *memory;
static size_t first, grows = SIZE_MAX, inputs;           /* the first past, one that grows; all */
static const char **input, **output;         /* "input_ids", ..., pasts; "logits", presents */
static const OrtValue **in; static OrtValue **out;
static int64_t *new_ids, *ones, *positions;  /* of CHUNK tokens; of the context */
static float *scores;                        /* of each token that may come next */

static void call(OrtStatus *s) { if (s) FAIL("onnxruntime: %s", ort->GetErrorMessage(s)); }
static void forget(Cache c) { for (u32 i = grows; i < inputs; i++) ort->ReleaseValue(c.past[i]); }
static OrtValue *tensor(void *data, int type, const int64_t *shape, size_t dimensions) {
    OrtValue *value;
    size_t bytes = type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 ? 8 : 4;    /* float16: 2 */
    for (size_t d = 0; d < dimensions; d++) bytes *= shape[d];
    call(ort->CreateTensorWithDataAsOrtValue(memory, data ? data : take(bytes, 1), bytes, shape,
                                             dimensions, type, &value));
    return value;
}
/* Input i of the graph, a past, before all tokens, and the name of its present. Keys and values are
   one buffer for the whole context, into which each step writes (SHARED), or grow from nothing with
   each step; the states of convolutions and delta nets are zeros. */
static void open_past(size_t i) {
    OrtTypeInfo *info; const OrtTensorTypeAndShapeInfo *about; ONNXTensorElementDataType type;
    size_t n, keys = strncmp(input[i], "past_key_values.", 16) ? 0 : 11; int64_t shape[8];
    call(ort->SessionGetInputTypeInfo(session, i, &info));
    call(ort->CastTypeInfoToTensorInfo(info, &about));
    call(ort->GetTensorElementType(about, &type)), call(ort->GetDimensionsCount(about, &n));
    call(ort->GetDimensions(about, shape, n = n < 8 ? n : 8));
    if ((!keys || !HAS(SHARED)) && grows > i) grows = i;
    for (size_t d = 0; d < n; d++)           /* -1 is the batch, or the number of tokens */
        if (shape[d] < 0) shape[d] = !d ? 1 : i < grows ? head->context : 0;
    empty.past[i] = tensor(NULL, type, shape, n);
    output[i] = strcat(strcpy(take(strlen(input[i]) + 8, 1), "present"), input[i] + 4 + keys);
}

static void open_model(const char *folder, int threads) {
    static const char *const known[] = {"input_ids", "attention_mask", "position_ids", ""};
    OrtEnv *environment; OrtSessionOptions *options; OrtAllocator *allocator; char path[1024];
    snprintf(path, sizeof path, "%s/model.onnx", folder);
    if (!(ort = OrtGetApiBase()->GetApi(21))) FAIL("onnxruntime is too old: take 1.30 or later");
    call(ort->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "answer", &environment));
    call(ort->CreateSessionOptions(&options)), call(ort->SetIntraOpNumThreads(options, threads));
    call(ort->CreateSession(environment, path, options, &session));
    call(ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
    call(ort->GetAllocatorWithDefaultOptions(&allocator));
    call(ort->SessionGetInputCount(session, &inputs));
    input = take(2 * inputs, sizeof *input), output = input + inputs, in = take(inputs, sizeof *in);
    out = take(2 * inputs, sizeof *out), empty.past = out + inputs;
    held = take(head->context, sizeof *held), scores = take(head->vocab, sizeof *scores);
    for (size_t i = 0; i < inputs; i++) {
        call(ort->SessionGetInputName(session, i, allocator, (char **)&input[i]));
        if (!strncmp(input[i], "past_", 5)) open_past(i);
        else if (strcmp(input[i], known[first++])) FAIL("answer.c knows no input %s", input[i]);
    }
    new_ids = take(CHUNK + 2 * head->context, sizeof *new_ids);
    ones = new_ids + CHUNK, positions = ones + head->context;
    for (size_t i = 0; i < head->context; i++) ones[i] = 1, positions[i] = i;
    output[first - 1] = "logits";
    out[first - 1] = tensor(scores, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
                            (int64_t[]){1, 1, head->vocab}, 3);
    taken = NULL;                            /* all this stays */
}
/* Read tokens, CHUNK at a time and what is left over first: a cache that holds them, too, and the
   scores of what may come next. What grows or changes is new in it, so `from` can be used again. */
static Cache read_tokens(Cache from, const u32 *ids, size_t n) {
    if (n > CHUNK) {
        Cache part = read_tokens(from, ids, n -= CHUNK), all = read_tokens(part, ids + n, CHUNK);
        return forget(part), all;
    }
    Cache to = {take(inputs, sizeof *to.past), from.length + n};
    int64_t *data[] = {new_ids, ones, positions + from.length}, shape[] = {1, 0};
    if (to.length >= head->context)
        FAIL("question %zu leaves no room for an answer in %u tokens", asked, head->context);
    holds = from.length;                     /* should the step fail */
    for (size_t i = 0; i < n; i++)
        if ((new_ids[i] = held[holds + i] = ids[i]) >= head->vocab) DAMAGED;
    for (size_t i = 0; i < first; i++) {
        shape[1] = i == 1 ? to.length : n;
        in[i] = tensor(data[i], ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, shape, 2);
    }
    for (size_t i = first; i < inputs; i++)
        in[i] = from.past[i], out[i] = i < grows ? from.past[i] : NULL;
    call(ort->Run(session, NULL, input, in, inputs, output + first - 1, inputs - first + 1,
                  out + first - 1));
    for (size_t i = 0; i < first; i++) ort->ReleaseValue((OrtValue *)in[i]);
    memcpy(to.past + first, out + first, (inputs - first) * sizeof *to.past);
    return holds = to.length, to;
}

/* 6. Answers *************************************************************************************/
static double power_of_e(double x) {         /* (e^(x / 4096))^4096, as libm is another library */
    double y = x / 4096, power = 1 + y * (1 + y / 2 * (1 + y / 3 * (1 + y / 4)));
    for (int i = 0; i < 12; i++) power *= power;
    return power;
}
/* log(sum of e^x): the log-probability of i among these is x[i] - log_of_sum(x, n). */
static double log_of_sum(const float *x, size_t n) {
    double highest = x[0], sum = 0, log = 0;
    for (size_t i = 1; i < n; i++) if (x[i] > highest) highest = x[i];
    for (size_t i = 0; i < n; i++) if (!(x[i] < highest - 30)) sum += power_of_e(x[i] - highest);
    if (!(sum > 0.5 && sum < 2.0 * n)) FAIL("the model's scores are not numbers");
    for (int i = 0; i < 20; i++) log += 2 * (sum - power_of_e(log)) / (sum + power_of_e(log));
    return highest + log;
}
static double now(void) {
    struct timespec t;
    return clock_gettime(CLOCK_MONOTONIC, &t) ? 0 : t.tv_sec + 1e-9 * t.tv_nsec;
}
/* The tokens that the model writes, `written` of them: the likeliest one again and again. */
static u32 *generate(Cache cache, size_t most) {
    u32 *ids = take(most + 1, sizeof *ids);
    for (written = 0; written < most; written++) {
        u32 best = 0, stop = 0; Cache last = cache;
        if (written) cache = read_tokens(last, ids + written - 1, 1), forget(last);
        for (u32 i = 1; i < head->vocab; i++) if (scores[i] > scores[best]) best = i;
        logprob += scores[best] - log_of_sum(scores, head->vocab);
        if (!written) first_token = now();
        while (stop < count[STOPS] && number(STOPS, stop) != best) stop++;
        if (stop < count[STOPS]) break;
        ids[written] = best;
    }
    return forget(cache), ids;
}
/* The text of `written` tokens: without white space before it, and U+FFFD for what is no UTF-8. */
static const char *text_of(const u32 *ids) {
    size_t length = 0, most = written * head->longest; u32 c, size;
    char *bytes = take(most + 1, 1), *text = take(3 * most + 1, 1), *to = text, *part;
    for (size_t i = 0; i < written; i++, length += size)
        part = text_at(ids[i], &size), memcpy(bytes + length, part, size);
    for (size_t i = 0; i < length; i += size) {
        if (!(size = read_character(bytes + i, length - i, &c)) || !c) c = 0xFFFD, size = 1;
        if (to > text || !(kind(c) & BLANK)) to += write_character(to, c);
    }
    return text;
}
/* The likeliest answer behind a node of CHOICES, if it is likelier than logprob. p: log-probability
   of the node, before which `ids` are still unread. A token competes with those alone that may
   stand in its place; where there is no other it is read without a choice. */
static void search(Cache from, u32 *ids, size_t unread, u32 node, double p, const Row **best) {
    const Row *row, *rows = table[CHOICES]; u32 n;
    for (; ; ids[unread++] = row->second, node = row->a) {
        for (n = 0, row = rows + node; node + n < count[CHOICES] && row[n].first == node;) n++;
        if (n > 1) break;
        if (n == 1 && row->b != NONE) { logprob = p, *best = row; return; }
        if (!n || row->a <= node) DAMAGED;
    }
    Cache cache = read_tokens(from, ids, unread);
    float *x = take(n, sizeof *x);
    for (u32 i = 0; i < n; i++) x[i] = row[i].second < head->vocab ? scores[row[i].second] : 0;
    double sum = log_of_sum(x, n);
    for (u32 k = 0; ; x[k] = -1e30f) {       /* the likeliest first, until none can win */
        for (u32 i = 0; i < n; i++) if (x[i] > x[k]) k = i;
        if (p + x[k] - sum <= logprob) break;
        if (row[k].b != NONE) logprob = p + x[k] - sum, *best = row + k;
        else if (row[k].a <= node) DAMAGED;
        else ids[0] = row[k].second, search(cache, ids, 1, row[k].a, p + x[k] - sum, best);
    }
    forget(cache);
}
/* The answer to a question: at most `most` tokens that the model writes, or, with the name of a
   task in `set` ("": the only one that has a set), the likeliest answer of its set. */
static const char *answer_text(const char *text, size_t length, const char *set, size_t most) {
    for (struct Block *block; (block = taken); free(block)) taken = block->next;
    asked++, logprob = 0, written = 0;
    u32 *ids = prompt_of(text, length), size;
    if (!length || !prompt_tokens) FAIL("question %zu is empty", asked);
    Cache from = empty;                      /* and what the prompt shares with the text held */
    while (grows >= inputs && from.length < holds && from.length + 1 < prompt_tokens &&
           held[from.length] == ids[from.length]) from.length++;
    size_t unread = prompt_tokens - from.length, room = head->context - prompt_tokens;
    ids += from.length;
    if (!set) return text_of(generate(read_tokens(from, ids, unread), most < room ? most : room));
    for (const Row *row = table[SETS], *end = row + count[SETS]; row < end; row++) {
        if (*set ? strcmp(set, text_at(row->first, &size)) : count[SETS] > 1) continue;
        logprob = -1e30;
        search(from, ids, unread, row->a, 0, &row);
        first_token = now();
        return text_at(row->a, &size);
    }
    FAIL("--choices=TASK: name one of the %u tasks that have a set of answers", count[SETS]);
}
/* Whether this device computes as the one that exported. */
static bool check(void) {
    Cache cache = read_tokens(empty, table[PROMPT], count[PROMPT]);
    float most = 0, apart = 0, off;
    for (u32 i = 0; i < head->vocab; i++)
        if (scores[i] > most || -scores[i] > most) most = scores[i] < 0 ? -scores[i] : scores[i];
    for (const Row *row = table[LARGEST], *end = row + count[LARGEST]; row < end; row++) {
        memcpy(&off, &row->a, sizeof off);
        off -= row->first < head->vocab ? scores[row->first] : 0;
        if (!(off <= apart && -off <= apart)) apart = off < 0 ? -off : off;
    }
    u32 *ids = generate(cache, count[FOLLOWING]);
    bool same = written == count[FOLLOWING] && !memcmp(ids, table[FOLLOWING], 4 * written);
    fprintf(stderr, "%s text, scores within %.1e of the largest; %.1e is allowed\n",
            same ? "the same" : "another", apart / most, head->tolerance);
    return same && apart <= head->tolerance * most;
}

#ifndef ANSWER_LIBRARY
int main(int argc, char **argv) {
    char *folder = NULL, *text = NULL, *set = NULL; size_t most = SIZE_MAX, size = 0;
    int threads = 0, checks = 0, wrong = 0;
    for (int i = 1; i < argc; i++)
        if (!strcmp(argv[i], "--check")) checks = 1;
        else if (!strncmp(argv[i], "--choices", 9)) set = argv[i] + 9 + (argv[i][9] == '=');
        else if (!strncmp(argv[i], "--threads=", 10)) threads = atoi(argv[i] + 10);
        else if (!strncmp(argv[i], "--max-tokens=", 13)) most = strtoul(argv[i] + 13, NULL, 10);
        else if (!folder) folder = argv[i];
        else wrong += text != NULL, text = argv[i];
    if (!folder || wrong) return fputs("usage: answer FOLDER [QUESTION] [--choices[=TASK]] "
        "[--max-tokens=N] [--threads=N] [--check]\n", stderr), 2;
    open_table(folder), open_model(folder, threads);
    if (checks) return !check();
    bool lines = !text;
    for (ssize_t n; (n = lines ? getline(&text, &size, stdin) : (ssize_t)strlen(text)) >= 0;) {
        while (lines && n && (text[n - 1] == '\n' || text[n - 1] == '\r')) n--;
        double start = now();
        for (const char *s = answer_text(text, n, set, most); *s; s++)
            if (lines && *s == '\n') fputs("\\n", stdout); else putchar(*s);
        if (putchar('\n') < 0 || fflush(stdout)) FAIL("cannot write the answer");
        fprintf(stderr, "[log-probability %.4f (%.1f %%), first token after %.3f s, %zu tokens at "
                "%.1f/s]\n", logprob, 100 * power_of_e(logprob), first_token - start, written,
                written / (now() - first_token));
        if (!lines) break;
    }
}
#endif
