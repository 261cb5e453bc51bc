/* Opens and asks a folder again and again, each time with another answer.bin. Standard input: how
   to ask, the bytes of the file and of the question as numbers of 32 bits, the file, the question.
   Prints a line each: "answered", or the error. */
#define ANSWER_LIBRARY
#include "answer.c"

int main(int argc, char **argv) {
    static char file[1 << 20], question[1 << 16];
    enum { TEXT, CHOICES_OF_ONE, CHECK };
    u32 how[3];
    if (argc != 3) return 2;
    while (fread(how, sizeof how, 1, stdin) && fread(file, 1, how[1], stdin) == how[1] &&
           fread(question, 1, how[2], stdin) == how[2]) {
        FILE *table = fopen(argv[2], "wb");
        if (!table || !fwrite(file, how[1], 1, table) || fclose(table)) return 3;
        question[how[2]] = 0;
        Answer *a = open_answer(argv[1], 1);
        AnswerResult r = {.most = 3, .best = how[0] == CHOICES_OF_ONE ? 3 : 0};
        if (!*answer_error(a) && how[0] == CHECK) check_answer(a);
        else if (!*answer_error(a)) ask_answer(a, question, r.best ? "one" : NULL, &r);
        puts(*answer_error(a) ? answer_error(a) : "answered");
        for (size_t i = 0; i < r.found; i++) if (!*r.choices[i].text) return 4;
        close_answer(a);
    }
    return 0;
}
