/* Reads bitbook files (formats 1 and 2, see src/bitbook/artifact/FORMAT.md) into arrays of float.
 *
 *     bitbook_error error;
 *     bitbook *book = bitbook_open("small.safetensors", 0, &error);
 *     if (book == NULL) fprintf(stderr, "%s\n", error.message);
 *
 * Plain C99 with libm, one file, no global state.  A file may come from a stranger: whatever its bytes are, the answer
 * is content or an error.  An open book is never changed, so that several threads may decode from it at once.
 */
#ifndef BITBOOK_H
#define BITBOOK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    BITBOOK_OK = 0,
    BITBOOK_UNREADABLE, /* the file cannot be opened or read */
    BITBOOK_NO_MEMORY,
    BITBOOK_CORRUPT,  /* not what it claims to be */
    BITBOOK_NEWER,    /* in a format that this reader does not know yet */
    BITBOOK_TOO_MANY, /* claims more elements than allowed; raise `max_elements` if you trust it */
    BITBOOK_NO_SUCH   /* no tensor has this number */
} bitbook_status;

typedef struct {
    bitbook_status status;
    char message[256]; /* what is wrong, and where: "fc1.weight: code 9 is not in [0, 5)" */
} bitbook_error;

typedef struct bitbook bitbook;

/* Opens a file and checks all that it says of itself, its checksum included.
 *
 * max_elements: how many elements (weights, side tensors and codes together) the file may claim, which bounds memory: a
 *     few bytes for each as a rule, 100 at most.  0 allows 2^24, or 4096 per byte of the file if that is more, as the
 *     Python reader does.
 * error: where to say what is wrong; may be NULL.
 * Returns NULL where anything is. */
bitbook *bitbook_open(const char *path, uint64_t max_elements, bitbook_error *error);

/* The same, of a file in memory, which must stay there until the book is closed. */
bitbook *bitbook_open_memory(const void *data, size_t size, uint64_t max_elements, bitbook_error *error);

/* Frees everything; NULL is allowed. */
void bitbook_close(bitbook *book);

/* How many tensors there are: those that are stored, by name, then names tied to one of them. */
size_t bitbook_count(const bitbook *book);

/* The rest asks about tensor number `i`, which must be below the count. */

/* Its name in UTF-8, ended by a zero; `length`, if not NULL, becomes the number of bytes before that. */
const char *bitbook_name(const bitbook *book, size_t i, size_t *length);

/* Its number of axes, and the extent of each. */
size_t bitbook_axes(const bitbook *book, size_t i);
const uint64_t *bitbook_shape(const bitbook *book, size_t i);

/* The product of its shape, which is how many floats decoding writes. */
uint64_t bitbook_elements(const bitbook *book, size_t i);

/* How it is stored: a type of safetensors such as "F32", or the name of its quantizer, such as "Uniform". */
const char *bitbook_stored_as(const bitbook *book, size_t i);

/* The number of the stored tensor that it stands for: its own, unless it is a tied name. */
size_t bitbook_target(const bitbook *book, size_t i);

/* Writes the tensor to `out`, row by row; other dense types are rounded to float.  The message names the tensor. */
bitbook_status bitbook_decode(const bitbook *book, size_t i, float *out, bitbook_error *error);

#ifdef __cplusplus
}
#endif

#endif
