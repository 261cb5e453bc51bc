/* Ask a model that `export.py RUN --port` wrote: compile answer.c, link onnxruntime 1.30 or later
   and libm.

       Answer *model = open_answer("mine", 0);
       AnswerResult result = {0};
       if (ask_answer(model, "Where is my card?", NULL, &result) == 0) puts(result.text);
       else fprintf(stderr, "%s\n", answer_error(model));
       close_answer(model);

   Texts are UTF-8. No function ends the process or keeps anything outside of its handle. Several
   handles may be open; each is used by one thread at a time. */
#pragma once
#include <stddef.h>

typedef struct Answer Answer;                /* an exported folder, opened */
typedef struct { const char *text; double logprob; } AnswerChoice;
typedef struct {
    /* set before a question: zeros for an answer in the model's own words */
    size_t most;                             /* tokens of the answer; 0: as many as there is room */
    size_t best;                             /* how many answers of the task's set, the likeliest */
    int trim;                                /* leave out white space around the question */
    /* of the answer, until the handle is used again; the set's answers are there if best > 0 */
    const char *text; double logprob;        /* the answer, and its log-probability */
    const AnswerChoice *choices; size_t found;
    size_t prompt_tokens, tokens, steps;     /* steps: runs of the graph after the prompt */
    double first_token;                      /* seconds until the first token, or the choice */
} AnswerResult;

/* Open a folder; threads: 0 for one a core. What could not be opened holds its error alone. */
Answer *open_answer(const char *folder, int threads);
/* Answer a question: 0, or 1 and there is an error. After an error, ask again. The instruction of
   the task comes before the question. task: NULL for the folder's only one, if it has one. */
int ask_answer(Answer *handle, const char *question, const char *task, AnswerResult *result);
/* 0 if files, tokens, scores and answer to a question are here what they were at the export. */
int check_answer(Answer *handle);
/* What went wrong at the last call, in one line; "" if nothing did. NULL: memory is out. */
const char *answer_error(const Answer *handle);
void close_answer(Answer *handle);
