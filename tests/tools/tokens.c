/* Prints the tokens of each text on standard input, or why there are none: a number of 32 bits, and
   as many bytes, text after text. The folder need not hold a model. */
#define ANSWER_LIBRARY
#include "answer.c"

int main(int argc, char **argv) {
    static char text[1 << 20];
    static Answer handle, *a = &handle;
    u32 length;
    if (argc != 2) return 2;
    a->folder = argv[1];
    if (setjmp(a->back)) return printf("error: %s\n", a->failure), 1;
    open_table(a), a->kept = a->taken, a->taken = NULL;
    while (fread(&length, sizeof length, 1, stdin) && fread(text, 1, length, stdin) == length) {
        size_t n;
        give_back(a, &a->taken);
        if (setjmp(a->back)) {
            printf("error: %s\n", a->failure);
            continue;
        }
        const u32 *ids = prompt_of(a, "", text, length, false, &n);
        for (size_t i = 0; i < n; i++) printf("%u ", ids[i]);
        putchar('\n');
    }
    return 0;
}
