// Put the folder that `export.py RUN --port` wrote into src/main/assets/model, then: gradle installDebug
plugins {
    id("com.android.application") version "8.7.3"
    id("org.jetbrains.kotlin.android") version "2.1.0"
}
val ort = "com.microsoft.onnxruntime:onnxruntime-android:1.30.0"
val aar: Configuration by configurations.creating
dependencies { implementation(ort); aar(ort) }
// The archive holds the C header and the libraries that CMakeLists.txt links.
val unpackOrt by tasks.registering(Copy::class) {
    from({ zipTree(aar.files.single { it.name.startsWith("onnxruntime-android") }) })
    into(layout.buildDirectory.dir("onnxruntime"))
}
tasks.configureEach { if (name.startsWith("configureCMake")) dependsOn(unpackOrt) }
android {
    namespace = "app"
    compileSdk = 35
    defaultConfig {
        minSdk = 24
        ndk { abiFilters += "arm64-v8a" }
        externalNativeBuild { cmake { arguments += "-DORT=${layout.buildDirectory.get()}/onnxruntime" } }
    }
    externalNativeBuild { cmake { path = file("CMakeLists.txt") } }
    androidResources { noCompress += listOf("onnx", "data", "bin") }
}
kotlin { jvmToolchain(17) }
