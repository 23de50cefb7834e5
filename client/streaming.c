/* Copies past the caches. A block that is put or got is not read again soon by this processor, and
   is larger than its caches are good for: plain stores would first read each line that they are
   about to overwrite. Several pages go side by side, so that several rows of memory are open, and
   what is read is asked for a little ahead. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { LINE = 64, PAGE = 4096, PAGES = 4, CHUNK = PAGE * PAGES };

#ifndef __SSE2__
#error "not for this processor: memmove does"
#endif
#include <immintrin.h>

/* So many chunks, in parts of a line. `to` is at the start of a line. */
#define COPY_CHUNKS(name, part, load, store)                                                     \
    static void name(char *to, const char *from, size_t chunks)                                  \
    {                                                                                            \
        enum { PARTS = LINE / sizeof(part) };                                                    \
        part parts[PARTS];                                                                       \
        for (; chunks; to += CHUNK, from += CHUNK, chunks--)                                     \
            for (size_t line = 0; line < PAGE; line += LINE) {                                   \
                for (size_t at = line; at < CHUNK; at += PAGE)                                   \
                    _mm_prefetch(from + at + CHUNK, _MM_HINT_T1); /* no fault past the end */    \
                for (size_t at = line; at < CHUNK; at += PAGE) {                                 \
                    for (int one = 0; one < PARTS; one++)                                        \
                        parts[one] = load((const part *)(from + at) + one);                      \
                    for (int one = 0; one < PARTS; one++)                                        \
                        store((part *)(to + at) + one, parts[one]);                              \
                }                                                                                \
            }                                                                                    \
    }

COPY_CHUNKS(chunks_16, __m128i, _mm_loadu_si128, _mm_stream_si128)
__attribute__((target("avx2")))
COPY_CHUNKS(chunks_32, __m256i, _mm256_loadu_si256, _mm256_stream_si256)

/* As memcpy; when it returns, other processors see all of it before whatever is stored next. */
void kvstore_stream(void *target, const void *source, size_t size)
{
    char *to = target;
    const char *from = source;
    size_t head = -(uintptr_t)to & (LINE - 1), whole;

    if (head > size)
        head = size;
    memcpy(to, from, head);
    to += head, from += head, size -= head;
    whole = size - size % CHUNK;
    (__builtin_cpu_supports("avx2") ? chunks_32 : chunks_16)(to, from, whole / CHUNK);
    _mm_sfence();
    memcpy(to + whole, from + whole, size - whole);
}
