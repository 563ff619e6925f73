#include "cli/job_words.h"

#include "base/file.h"
#include "base/memory.h"
#include "base/text.h"
#include <stdlib.h>
#include <string.h>

static int first_after_starter(char *const *words) {
    static const char *const starters[] = {"mpirun", "mpiexec", "orterun", "prterun", "prun", "srun"};
    for (int i = 0; words[i]; i++)
        for (size_t s = 0; s < sizeof starters / sizeof *starters; s++)
            if (strncmp(path_name(words[i]), starters[s], strlen(starters[s])) == 0)
                return i + 1;
    return 0;
}

static int positive(const char *text) {
    char *end;
    long value = text ? strtol(text, &end, 10) : 0;
    return text && end != text && !*end && value > 0 && value <= 1 << 20 ? (int)value : 0;
}

struct rank_words job_words_ranks(char *const *words) {
    static const char *const flags[] = {"-n", "-np", "--np", "--ntasks"};
    for (int i = first_after_starter(words); words[i]; i++)
        for (size_t f = 0; f < sizeof flags / sizeof *flags; f++) {
            size_t size = strlen(flags[f]);
            if (strcmp(words[i], flags[f]) == 0 && positive(words[i + 1]))
                return (struct rank_words){i + 1, 0, positive(words[i + 1])};
            if (strncmp(words[i], flags[f], size) == 0 && words[i][size] == '=' && positive(words[i] + size + 1))
                return (struct rank_words){i, (int)size + 1, positive(words[i] + size + 1)};
        }
    return (struct rank_words){.index = -1};
}

const char *job_words_flag(char *const *words, const char *flag) {
    const char *value = NULL;
    size_t size = strlen(flag);
    for (int i = 0; words[i]; i++)
        if (strcmp(words[i], flag) == 0 && words[i + 1])
            value = words[i + 1];
        else if (strncmp(words[i], flag, size) == 0 && words[i][size] == '=')
            value = words[i] + size + 1;
    return value;
}

static void fill_word(const char *word, int ranks, const char *hosts_path, struct text *out) {
    while (*word)
        if (strncmp(word, "{ranks}", 7) == 0 && ranks > 0) {
            text_printf(out, "%d", ranks);
            word += 7;
        } else if (strncmp(word, "{hosts}", 7) == 0 && hosts_path) {
            text_add_string(out, hosts_path);
            word += 7;
        } else {
            text_add(out, word++, 1);
        }
}

char **job_words_fill(char *const *words, struct rank_words place, int ranks, const char *hosts_path) {
    int count = 0;
    while (words[count])
        count++;
    char **filled = memory_must((size_t)count + 1, sizeof *filled);
    for (int i = 0; i < count; i++) {
        struct text word = {0};
        if (i == place.index && ranks > 0) {
            text_add(&word, words[i], (size_t)place.prefix_bytes);
            text_printf(&word, "%d", ranks);
        } else {
            fill_word(words[i], ranks, hosts_path, &word);
        }
        filled[i] = memory_copy_string(text_string(&word));
        text_release(&word);
    }
    return filled;
}

void job_words_free(char **words) {
    for (int i = 0; words[i]; i++)
        free(words[i]);
    free(words);
}

int job_words_hold(char *const *words, const char *text) {
    for (int i = 0; words[i]; i++)
        if (strstr(words[i], text))
            return 1;
    return 0;
}
