/* Reads files from the standard input, each behind its length in 4 bytes, and prints a line for each: the status, and
 * the CRC-32 of names, shapes and values where it was read.  Each lies in memory of just its size, for sanitizers to
 * watch. */

#include "bitbook.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST_ELEMENTS 65536 /* as tests/artifact/fuzz.py allows */

static uint32_t crc = 0;

static void count_in(const void *data, size_t size) {
    const unsigned char *bytes = data;
    crc = ~crc;
    for (size_t i = 0; i < size; i++) {
        crc ^= bytes[i];
        for (int bit = 0; bit < 8; bit++) crc = crc & 1 ? 0xEDB88320u ^ crc >> 1 : crc >> 1;
    }
    crc = ~crc;
}

static bitbook_status read_all(const void *data, size_t size) {
    bitbook_error error;
    bitbook *book = bitbook_open_memory(data, size, MOST_ELEMENTS, &error);
    if (book == NULL) return error.status;
    bitbook_status status = BITBOOK_OK;
    for (size_t i = 0; status == BITBOOK_OK && i < bitbook_count(book); i++) {
        size_t length, count = (size_t)bitbook_elements(book, i);
        const char *name = bitbook_name(book, i, &length);
        float *values = malloc(count * sizeof *values + 1);
        if (values == NULL) exit(1);
        status = bitbook_decode(book, i, values, &error);
        for (size_t k = 0; status == BITBOOK_OK && k < count; k++) {
            static const uint32_t nan = 0x7FC00000; /* all are one: what their bits are is a matter of taste */
            if (values[k] != values[k]) memcpy(&values[k], &nan, sizeof nan);
        }
        count_in(name, length + 1);
        count_in(bitbook_shape(book, i), bitbook_axes(book, i) * sizeof(uint64_t));
        if (status == BITBOOK_OK) count_in(values, count * sizeof *values);
        free(values);
    }
    bitbook_close(book);
    return status;
}

int main(void) {
    unsigned char head[4];
    while (fread(head, 1, 4, stdin) == 4) {
        size_t size = head[0] | (size_t)head[1] << 8 | (size_t)head[2] << 16 | (size_t)head[3] << 24;
        void *data = malloc(size ? size : 1);
        if (data == NULL || fread(data, 1, size, stdin) != size) return 1;
        crc = 0;
        bitbook_status status = read_all(data, size);
        printf("%d %" PRIu32 "\n", (int)status, status == BITBOOK_OK ? crc : 0);
        fflush(stdout);
        free(data);
    }
    return 0;
}
