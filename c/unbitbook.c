/* unbitbook FILE                 lists the tensors of a bitbook file: shape, how it is stored, name
 * unbitbook FILE FOLDER          writes each into the folder, which must exist, as NAME.npy, little-endian float32
 * unbitbook --raw FILE FOLDER    the same without NumPy's header, as NAME.f32
 *
 * In names of files, bytes of NAME other than letters, digits, "_", "-" and "." within are written %XX. */

#include "bitbook.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void print_shape(FILE *file, const bitbook *book, size_t i) {
    size_t axes = bitbook_axes(book, i);
    fputc('(', file);
    for (size_t k = 0; k < axes; k++) fprintf(file, k ? ", %" PRIu64 : "%" PRIu64, bitbook_shape(book, i)[k]);
    fputs(axes == 1 ? ",)" : ")", file);
}

static void list(const bitbook *book) {
    for (size_t i = 0; i < bitbook_count(book); i++) {
        print_shape(stdout, book, i);
        printf("  %s  %s", bitbook_stored_as(book, i), bitbook_name(book, i, NULL));
        if (bitbook_target(book, i) != i) printf("  = %s", bitbook_name(book, bitbook_target(book, i), NULL));
        putchar('\n');
    }
}

/* The header of NumPy's format 1.0, filled up to a multiple of 64 bytes. */
static void write_npy_header(FILE *file, const bitbook *book, size_t i) {
    size_t axes = bitbook_axes(book, i), digits = 0;
    for (size_t k = 0; k < axes; k++) {
        digits += (size_t)snprintf(NULL, 0, k ? ", %" PRIu64 : "%" PRIu64, bitbook_shape(book, i)[k]);
    }
    size_t text = strlen("{'descr': '<f4', 'fortran_order': False, 'shape': }") + digits + (axes == 1 ? 3 : 2);
    size_t size = (10 + text + 1 + 63) / 64 * 64 - 10;
    fwrite("\x93NUMPY\x01\x00", 1, 8, file);
    fputc((int)(size & 255), file);
    fputc((int)(size >> 8), file);
    fputs("{'descr': '<f4', 'fortran_order': False, 'shape': ", file);
    print_shape(file, book, i);
    fputc('}', file);
    for (size_t k = text; k < size - 1; k++) fputc(' ', file);
    fputc('\n', file);
}

static void write_floats(FILE *file, const float *values, uint64_t count) {
    for (uint64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, &values[i], sizeof bits);
        for (int k = 0; k < 4; k++) fputc((int)(bits >> 8 * k & 255), file);
    }
}

/* FOLDER/NAME and the ending, to be freed. */
static char *path_of(const char *folder, const char *name, size_t length, const char *ending) {
    char *path = malloc(strlen(folder) + 3 * length + strlen(ending) + 2);
    if (path == NULL) return NULL;
    char *out = path + sprintf(path, "%s/", folder);
    for (size_t i = 0; i < length; i++) {
        unsigned char c = (unsigned char)name[i];
        bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
        if (letter || c == '_' || c == '-' || (c == '.' && i)) *out++ = (char)c;
        else out += sprintf(out, "%%%02X", c);
    }
    strcpy(out, ending);
    return path;
}

static bool write_tensor(const bitbook *book, size_t i, const char *folder, bool raw) {
    size_t length;
    const char *name = bitbook_name(book, i, &length);
    bitbook_error error;
    uint64_t count = bitbook_elements(book, i);
    float *values = count < SIZE_MAX / sizeof *values ? malloc((size_t)count * sizeof *values + 1) : NULL;
    char *path = path_of(folder, name, length, raw ? ".f32" : ".npy");
    bool written = false;
    if (values == NULL || path == NULL) {
        fprintf(stderr, "%s: no memory for %" PRIu64 " floats\n", name, count);
    } else if (bitbook_decode(book, i, values, &error) != BITBOOK_OK) {
        fprintf(stderr, "%s\n", error.message);
    } else {
        FILE *file = fopen(path, "wb");
        if (file) {
            if (!raw) write_npy_header(file, book, i);
            write_floats(file, values, count);
            bool failed = ferror(file);
            written = fclose(file) == 0 && !failed;
        }
        if (!written) fprintf(stderr, "%s cannot be written\n", path);
    }
    free(path);
    free(values);
    return written;
}

int main(int count, char **arguments) {
    bool raw = count > 1 && strcmp(arguments[1], "--raw") == 0;
    const char *file = count > 1 + raw ? arguments[1 + raw] : NULL;
    const char *folder = count > 2 + raw ? arguments[2 + raw] : NULL;
    if (file == NULL || count > 3 + raw || (raw && folder == NULL)) {
        fputs("usage: unbitbook FILE | unbitbook [--raw] FILE FOLDER\n", stderr);
        return 2;
    }
    bitbook_error error;
    bitbook *book = bitbook_open(file, 0, &error);
    if (book == NULL) {
        fprintf(stderr, "%s\n", error.message);
        return 1;
    }
    bool fine = true;
    if (folder == NULL) list(book);
    for (size_t i = 0; folder && i < bitbook_count(book); i++) fine = write_tensor(book, i, folder, raw) && fine;
    bitbook_close(book);
    return fine ? 0 : 1;
}
