/* Prints the tokens of each text on standard input, or why there are none: a number of 32 bits, and
   as many bytes, text after text. It uses answer.c as an app does. */
#define ANSWER_LIBRARY
#define ANSWER_FAIL(message) longjmp(back, 1)
#include <setjmp.h>
static jmp_buf back;
#include "answer.c"

int main(int argc, char **argv) {
    static char text[1 << 20];
    u32 length;
    if (argc != 2) return 2;
    if (setjmp(back)) return printf("error: %s\n", failure), 1;
    open_table(argv[1]);
    while (fread(&length, sizeof length, 1, stdin) && fread(text, 1, length, stdin) == length) {
        for (struct Block *block; (block = taken); free(block)) taken = block->next;
        if (setjmp(back)) {
            printf("error: %s\n", failure);
            continue;
        }
        const u32 *ids = prompt_of(text, length);
        for (size_t i = 0; i < prompt_tokens; i++) printf("%u ", ids[i]);
        putchar('\n');
    }
    return 0;
}
