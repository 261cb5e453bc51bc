/* answer.h for app/Answer.java. */
#include "answer.h"
#include <jni.h>
#include <stdint.h>
#include <string.h>

static void raise_error(JNIEnv *env, const Answer *model) {
    jclass error = (*env)->FindClass(env, "java/lang/IllegalStateException");
    if (error) (*env)->ThrowNew(env, error, answer_error(model));
}
static char *bytes_of(JNIEnv *env, jbyteArray array) {
    return array ? (char *)(*env)->GetByteArrayElements(env, array, NULL) : NULL;
}
static void give_back(JNIEnv *env, jbyteArray array, char *bytes) {
    if (bytes) (*env)->ReleaseByteArrayElements(env, array, (jbyte *)bytes, JNI_ABORT);
}
JNIEXPORT jlong JNICALL Java_app_Answer_open(JNIEnv *env, jclass self, jbyteArray folder, jint threads) {
    char *path = bytes_of(env, folder);
    Answer *model = path ? open_answer(path, threads) : NULL;
    give_back(env, folder, path);
    if (!*answer_error(model)) return (jlong)(intptr_t)model;
    raise_error(env, model), close_answer(model);
    return (void)self, 0;
}
JNIEXPORT jbyteArray JNICALL Java_app_Answer_ask(JNIEnv *env, jclass self, jlong handle,
                                                 jbyteArray question, jbyteArray task, jboolean choose) {
    Answer *model = (Answer *)(intptr_t)handle;
    AnswerResult result = {.best = choose ? 1 : 0};
    char *text = bytes_of(env, question), *name = bytes_of(env, task);
    int failed = !text || ask_answer(model, text, name, &result);
    give_back(env, question, text), give_back(env, task, name);
    if (failed) return raise_error(env, model), NULL;
    jsize length = (jsize)strlen(result.text);
    jbyteArray answer = (*env)->NewByteArray(env, length);
    if (answer) (*env)->SetByteArrayRegion(env, answer, 0, length, (const jbyte *)result.text);
    return (void)self, answer;
}
JNIEXPORT void JNICALL Java_app_Answer_close(JNIEnv *env, jclass self, jlong handle) {
    (void)env, (void)self, close_answer((Answer *)(intptr_t)handle);
}
