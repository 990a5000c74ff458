class KeyRing:
    def caller(self, key):
        return "anonymous"

    def reload_if_changed(self):
        return None
